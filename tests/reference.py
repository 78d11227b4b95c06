"""Loads the reference data in tests/reference_data: numbers made by the official TensorFlow code.

Arrays are cached; do not write into them.
"""

import functools
import importlib.util
import json
import pathlib
from types import ModuleType

import numpy as np

from effv2_jax.convert import mapping, names_tf
from effv2_jax.models.block_spec import BlockSpec, expand_blocks, parse_blocks
from effv2_jax.models.variants import get_variant

DATA = pathlib.Path(__file__).parent / "reference_data"


@functools.cache
def _weights_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference_weights", DATA / "weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def image(h: int, w: int, n: int = 2, seed: int = 0, channels: int = 3) -> np.ndarray:
    """The reference images: float32 [n, h, w, channels] in [-1, 1]."""
    return _weights_module().image(h, w, n, seed, channels=channels)


def make_all(specs) -> dict[str, np.ndarray]:
    """The reference weights of (official name, shape, ...) entries: {official name: float32}."""
    return _weights_module().make_all(specs)


@functools.cache
def load_json(name: str):
    """A JSON file by its path below reference_data, e.g. "models.json"."""
    return json.loads((DATA / name).read_text())


@functools.cache
def load_npz(name: str) -> dict[str, np.ndarray]:
    """An npz file by its path below reference_data, e.g. "blocks.npz", as a dict."""
    with np.load(DATA / name) as archive:
        return {key: archive[key] for key in archive.files}


def model_facts(name: str) -> dict:
    """The entry of models.json: parameters, sizes, blocks, endpoints, variables."""
    return load_json("models.json")[name]


def model_logits(name: str) -> dict[str, np.ndarray]:
    """models/<name>.npz: logits and endpoints of `square`, `rect` and, for some, `full`."""
    return load_npz(f"models/{name}.npz")


def model_input(name: str, case: str) -> np.ndarray:
    """The images behind `model_logits`; case is "square", "rect" or "full"."""
    if case == "square":
        return image(128, 128, 2, 0)
    if case == "rect":
        return image(94, 133, 2, 1)
    size = model_facts(name)["eval_size"]
    return image(size, size, 1, 2)


def model_variables(name: str) -> dict:
    """The reference weights of an official network as our variable tree (NumPy)."""
    variant = get_variant(name)
    blocks = expand_blocks(variant.blocks, width=variant.width, depth=variant.depth)
    values = make_all(model_facts(name)["variables"])
    return mapping.arrange(values, names_tf.tensor_names(blocks))


def train_variables(case: str) -> dict:
    """The initial weights of a case of train/train.json, e.g. "a_rmsprop", as our tree."""
    facts = load_json("train/train.json")
    blocks = expand_blocks(parse_blocks(facts["blocks"]), width=1.0, depth=1.0)
    values = make_all(facts["cases"][case]["variables"])
    return mapping.arrange(values, names_tf.tensor_names(blocks))


def block_spec(case: dict) -> BlockSpec:
    """The `BlockSpec` of an entry of blocks.json of kind "mbconv" or "fused"."""
    return BlockSpec(
        fused=case["kind"] == "fused",
        kernel=case["kernel"],
        stride=case["stride"],
        expand=case["expand"],
        in_channels=case["cin"],
        channels=case["cout"],
        repeats=1,
        se=case["se_ratio"] or 0.0,
    )


def case_names(case: dict) -> tuple[mapping.TensorName, ...]:
    """The names of the variables of an entry of blocks.json; blocks are called blocks_3."""
    if case["kind"] == "stem":
        return names_tf.stem_names()
    if case["kind"] == "head":
        return names_tf.head_names()
    return names_tf.block_names("blocks_3", block_spec(case))


def relative_error(found, expected) -> float:
    """Largest difference, relative to the largest magnitude of the expected array."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float(np.max(np.abs(found - expected)) / max(np.max(np.abs(expected)), 1e-30))


ENDPOINTS = (
    "stem",
    *(f"reduction_{i}" for i in range(1, 6)),
    "features",
    "head_1x1",
    "pooled_features",
)


def logits_deviation(logits, expected) -> float:
    """Root mean square difference / standard deviation of the expected logits."""
    logits, expected = np.asarray(logits, np.float64), np.asarray(expected, np.float64)
    assert logits.shape == expected.shape, (logits.shape, expected.shape)
    return float(np.sqrt(np.mean((logits - expected) ** 2)) / np.std(expected))


def endpoint_deviations(name: str, case: str, ends: dict) -> dict[str, float]:
    """Largest deviation of each endpoint's stored facts, relative to its size.

    The norm relative to itself; mean and corner values to the root mean square of the endpoint.

    Raises:
      AssertionError: an endpoint has another shape.
    """
    stored, out = model_logits(name), {}
    for end in ENDPOINTS:
        x = np.asarray(ends[end], np.float64)
        assert list(x.shape) == list(stored[f"{case}_{end}_shape"]), (end, x.shape)
        axes = tuple(range(1, x.ndim))
        norm = stored[f"{case}_{end}_l2"]
        scale = norm / np.sqrt(x[0].size)
        found = [np.abs(np.sqrt(np.sum(x**2, axes)) - norm) / norm]
        found.append(np.abs(x.mean(axes) - stored[f"{case}_{end}_mean"]) / scale)
        if x.ndim == 4:
            for corner, values in (("first", x[:, 0, 0, :8]), ("last", x[:, -1, -1, :8])):
                difference = np.abs(values - stored[f"{case}_{end}_{corner}"])
                found.append(np.max(difference, 1) / scale)
        out[end] = float(np.max(found))
    return out
