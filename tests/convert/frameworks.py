"""The stored weights of other frameworks (tests/reference_data/frameworks) and their networks."""

import functools

import numpy as np

from effv2_jax.convert import names_keras, names_timm, names_torchvision
from effv2_jax.convert.conversion import Conversion
from effv2_jax.models.network import EfficientNet, create_model
from effv2_jax.models.variants import get_variant
from tests import reference

FOLDER = reference.DATA / "frameworks"
CONVERTERS = {"timm": names_timm, "torchvision": names_torchvision, "keras": names_keras}


@functools.cache
def network(name: str) -> EfficientNet:
    """The network of a stored file, by the name of its logits."""
    if name == "timm_tf":
        return create_model("testing", 5)
    if name == "timm_rw":
        blocks = ("r1_k3_s1_e1_i8_o8_c1_p1", "r1_k3_s2_e1_i8_o16_se0.25",
                  "r2_k5_s2_e4_i16_o24_se0.25")  # fmt: skip
        return create_model("testing", 5, blocks=blocks, padding="SYMMETRIC", bn_epsilon=1e-5)
    if name == "torchvision":
        blocks = (*get_variant("testing").blocks, "r1_k3_s1_e1_i24_o32_se0.25")
        return create_model("testing", 5, blocks=blocks, padding="SYMMETRIC")
    if name == "keras_v2":
        return create_model("testing", 5, feature_size=320)
    blocks = ("r1_k3_s1_e1_i8_o8_se0.25", "r2_k5_s2_e4_i8_o16_se0.25")
    return create_model("testing", 5, blocks=blocks, feature_size=320)


def convert(file: str, **options) -> Conversion:
    """Converts a stored file."""
    name = file.split(".")[0].removesuffix("_legacy")
    converter = CONVERTERS[name.split("_")[0]]
    return converter.convert(FOLDER / file, model=network(name), **options)


def images() -> np.ndarray:
    """What the frameworks were given."""
    return reference.image(64, 64, 2, 900)


def logits(name: str) -> np.ndarray:
    """What they computed."""
    framework = "keras" if name.startswith("keras") else "torch"
    return reference.load_npz(f"frameworks/logits_{framework}.npz")[name]
