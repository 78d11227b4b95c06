"""Released weights by name: the table, the download, the cache.

The names below are imported on first use: the table alone (`released`) costs nothing and loads no
JAX.
"""

import importlib

_PUBLIC = {
    "open_weights": "effv2_jax.pretrained.load",
}

__all__ = ["open_weights"]


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'effv2_jax.pretrained' has no attribute {name!r}")
