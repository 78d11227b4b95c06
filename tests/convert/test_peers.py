"""Against the real Keras, timm and torchvision, where they are installed.

`python tools/convert_parity.py timm` (torchvision, keras) prints the deviations as a table.
"""

import math

import numpy as np
import pytest
from safetensors.numpy import save_file

from effv2_jax.convert import names_keras, names_timm, names_torchvision, peers
from effv2_jax.convert.conversion import parity
from effv2_jax.convert.mapping import expected_there
from effv2_jax.convert.source import source_per_network
from effv2_jax.data.kinds import get_kind
from effv2_jax.models.initial_variables import init_variables
from effv2_jax.models.network import create_model

pytestmark = pytest.mark.slow

# Ten times what float32 alone moves the logits (2e-6 to 3e-6), relative to their deviation.
TOLERANCE = 2e-5


def _id(source) -> str:
    return source.name.split(".")[0]


def _check(source, forward):
    deviation = parity(peers.random_conversion(source), forward)
    assert deviation < TOLERANCE


@pytest.mark.parametrize("source", source_per_network(names_timm.SOURCES), ids=_id)
def test_logits_equal_those_of_timm(source):
    pytest.importorskip("timm", reason="compares with timm")
    _check(source, peers.timm_forward(""))


@pytest.mark.parametrize("source", source_per_network(names_torchvision.SOURCES), ids=_id)
def test_logits_equal_those_of_torchvision(source):
    pytest.importorskip("torchvision", reason="compares with torchvision")
    _check(source, peers.torchvision_forward(""))


@pytest.mark.parametrize("source", source_per_network(names_keras.SOURCES), ids=_id)
def test_logits_equal_those_of_keras(source):
    pytest.importorskip("keras", reason="compares with Keras")
    _check(source, peers.keras_forward(""))


def _torch_shapes(network) -> dict:
    return {
        name: tuple(tensor.shape)
        for name, tensor in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


def _norms(network) -> set:
    import torch

    norms = (m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d))
    return {(norm.eps, 1 - norm.momentum) for norm in norms}


def _ours(module, source):
    model = create_model(source.model, 1000, **source.overrides)
    expected = expected_there(module.tensor_names(model), model)
    return {name: shape for name, (_, shape) in expected.items()}, model


@pytest.mark.parametrize("source", source_per_network(names_timm.SOURCES), ids=_id)
def test_names_shapes_norms_and_preprocessing_are_those_of_timm(source):
    timm = pytest.importorskip("timm", reason="compares with timm")
    import torch

    with torch.device("meta"):
        network = timm.create_model(source.name.split(".")[0])
    shapes, model = _ours(names_timm, source)
    assert shapes == _torch_shapes(network)
    assert _norms(network) == {(model.bn_epsilon, model.bn_momentum)}
    for other in names_timm.SOURCES:
        if other.model == source.model:
            cfg = timm.get_pretrained_cfg(other.name)
            squash = "squash" if cfg.crop_mode == "squash" else ""
            half = "half" if cfg.mean == (0.5,) * 3 else "imagenet"
            kind = f"pillow-{cfg.interpolation}-{squash}{cfg.crop_pct:g}-{half}"
            size = (cfg.test_input_size or cfg.input_size)[-1]
            assert (other.image_size, other.preprocessing) == (size, kind), other.name
    default = timm.get_pretrained_cfg(source.name.split(".")[0])
    assert f"{default.architecture}.{default.tag}" == source.name


@pytest.mark.parametrize("source", source_per_network(names_torchvision.SOURCES), ids=_id)
def test_names_shapes_norms_and_preprocessing_are_those_of_torchvision(source):
    torchvision = pytest.importorskip("torchvision", reason="compares with torchvision")
    import torch

    with torch.device("meta"):
        network = torchvision.models.get_model(source.name, weights=None)
    shapes, model = _ours(names_torchvision, source)
    assert shapes == _torch_shapes(network)
    assert _norms(network) == {(model.bn_epsilon, model.bn_momentum)}
    theirs = torchvision.models.get_model_weights(source.name).DEFAULT.transforms()
    kind = get_kind(source.preprocessing)
    assert theirs.crop_size == [source.image_size]
    assert theirs.resize_size == [math.floor(source.image_size / kind.share)]
    assert theirs.interpolation.value == ("bicubic" if kind.bicubic else "bilinear")
    np.testing.assert_allclose(np.asarray(kind.mean) / 255, theirs.mean, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(kind.std) / 255, theirs.std, rtol=1e-6)


def test_timm_loads_what_was_exported_strictly(tmp_path):
    timm = pytest.importorskip("timm", reason="compares with timm")
    from safetensors.torch import load_file

    model = create_model("efficientnetv2-b0", 7)
    tensors = names_timm.export(model, init_variables(model, 0))
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    network = timm.create_model(names_timm.timm_name(model), num_classes=7)
    network.load_state_dict(load_file(tmp_path / "a.safetensors"), strict=True)
    stem = network.conv_stem.weight.detach().numpy()
    np.testing.assert_array_equal(stem, tensors["conv_stem.weight"])
