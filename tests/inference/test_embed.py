"""tools/embed.py: the pooled features, and what belongs to them."""

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from effv2_jax.convert.weights_file import load_weights
from effv2_jax.data.decode import decode
from effv2_jax.data.kinds import get_kind
from effv2_jax.data.preprocess import evaluation_image
from tests.data.pictures import class_folders
from tests.inference.networks import SIZE, write_weights

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def embed():
    specification = importlib.util.spec_from_file_location("embed", TOOLS / "embed.py")
    tool = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(tool)
    return lambda *a: tool.main([*map(str, a), "--no-tune"])


def test_features_are_the_pooled_ones_of_each_picture(embed, tmp_path, capsys):
    weights = write_weights(tmp_path / "w.safetensors")
    photos = class_folders(tmp_path / "photos", {"ant": 3, "bee": 2})
    out = tmp_path / "features.npz"
    assert embed(weights, photos, "--out", out, "--batch-size", "2") == 0
    assert f"{out}: 5 x 32 features" in capsys.readouterr().err
    with np.load(out) as table:
        content = dict(table)
    assert content["features"].dtype == np.float32
    assert content["labels"].tolist() == ["ant"] * 3 + ["bee"] * 2
    assert content["sha256"] == hashlib.sha256(Path(weights).read_bytes()).hexdigest()
    assert content["model"] == "testing"
    model, variables, _ = load_weights(weights)
    for name, found in zip(content["names"], content["features"], strict=True):
        pixels = decode(Path(str(name)).read_bytes(), name="")
        image = (evaluation_image(pixels, size=SIZE, kind=get_kind("v2")) - 128) / 128
        _, ends = model.apply(variables, image[None], endpoints=True)
        np.testing.assert_allclose(found, ends["pooled_features"][0], rtol=1e-4, atol=1e-5)


def test_file_stays_as_it_was_if_a_picture_is_broken(embed, tmp_path, capsys):
    weights = write_weights(tmp_path / "w.safetensors")
    photos = class_folders(tmp_path / "photos", {"ant": 2})
    (photos / "ant" / "text.jpg").write_text("no picture")
    out = tmp_path / "features.npz"
    out.write_bytes(b"old")
    assert embed(weights, photos, "--out", out) == 2
    assert out.read_bytes() == b"old"
    assert "text.jpg: cannot decode" in capsys.readouterr().err
    assert embed(weights, photos, "--out", out, "--on-corrupt", "skip") == 0
    assert np.load(out)["features"].shape == (2, 32)


def test_wrong_output_name_is_refused_before_any_work(embed, tmp_path, capsys):
    assert embed("none.safetensors", tmp_path, "--out", tmp_path / "features.txt") == 2
    assert "expected a name ending in .npz" in capsys.readouterr().err
