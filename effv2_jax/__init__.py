"""EfficientNetV2 in pure JAX/Flax. The names below are the public surface; the rest may move."""

import importlib

from effv2_jax.errors import UserError

__version__ = "0.1.0"

# name -> module that defines it. Imported on first use, so that `import effv2_jax` costs nothing
# and the data workers, which need no JAX, never load it.
_PUBLIC = {
    "create_model": "effv2_jax.models.network",
    "list_models": "effv2_jax.models.variants",
    "list_pretrained": "effv2_jax.pretrained.load",
    "load_pretrained": "effv2_jax.pretrained.load",
    "load_weights": "effv2_jax.convert.weights_file",
    "save_weights": "effv2_jax.convert.weights_file",
}

__all__ = ["UserError", "__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'effv2_jax' has no attribute {name!r}; public names: {__all__}")


def __dir__() -> list[str]:
    return sorted(__all__)
