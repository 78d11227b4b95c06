"""A run's config as something to measure: its stages, without its data."""

from collections.abc import Mapping
from typing import Any

from effv2_jax.config import validate
from effv2_jax.config_files import apply_overrides, load_config, split_argument

# The plan of a run depends on how many examples there are; ImageNet's.
_EXAMPLES = 1_281_167
_CLASSES = 1000


def load(spec: str, *, devices: int = 0, overrides: Mapping[str, str] | None = None) -> Any:
    """Returns the config of `configs/NAME.py[:argument]` with made-up pictures for its data.

    Args:
        spec: as of --config; the classes are the config's, 1000 where it leaves them to the data.
        devices: of the data mesh; 0: all.
        overrides: keys of the config and values, as text.

    Raises:
        UserError: as of `load_config` and `validate`.
    """
    config = load_config(*split_argument(spec))
    apply_overrides(config, overrides or {})
    config.data.source, config.data.num_examples = "synthetic", _EXAMPLES
    config.data.name = f"{config.model.num_classes or _CLASSES}x32"
    config.init.weights = ""  # what is trained from does not change how fast
    config.runtime.devices = devices
    validate(config)
    return config


def stages(config: Any) -> tuple[Any, ...]:
    """Returns the stages that `training.progressive` plans for such a config; loads no JAX."""
    from effv2_jax.models.variants import get_variant
    from effv2_jax.training.progressive import make_stages

    return make_stages(config, variant=get_variant(config.model.name), num_examples=_EXAMPLES)
