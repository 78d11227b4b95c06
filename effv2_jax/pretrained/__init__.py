"""Released weights by name: the table, the download, the cache, the command.

The names below are imported on first use: the table alone (`released`) costs nothing and loads no
JAX.
"""

import importlib

__all__ = ["list_pretrained", "load_pretrained", "open_weights"]


def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(importlib.import_module("effv2_jax.pretrained.load"), name)
    raise AttributeError(f"module 'effv2_jax.pretrained' has no attribute {name!r}")
