"""configs/folder.py:finetune in one command: from a weights file, and from released weights."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import PIL.Image
import pytest

from effv2_jax import main as command
from effv2_jax.convert.weights_file import load_weights, save_weights
from effv2_jax.data.kinds import describe
from effv2_jax.models.initial_variables import init_variables
from effv2_jax.models.network import create_model
from effv2_jax.pretrained import released
from effv2_jax.pretrained.released import Released
from tests import reference

ROOT = Path(__file__).parents[2]

SMALL = {
    "model.name": "testing",
    "model.dtype": "float32",
    "model.lowering": "plain",
    "data.eval_fraction": 0.25,
    "train.batch_size": 4,
    "train.min_steps": 4,
    "train.epochs": 1,
    "train.learning_rate": 0.05,
    "runtime.devices": 1,
    "runtime.tensorboard": "false",
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Eight photos of each of two classes."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for index, name in enumerate(("ants", "bees")):
        (folder / name).mkdir()
        for i in range(8):
            pixels = rng.integers(0, 128, (40, 44, 3), np.uint8)
            pixels[..., index] += 120
            PIL.Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A weights file of ten classes."""
    path = tmp_path_factory.mktemp("weights") / "ten.safetensors"
    model = create_model("testing", 10)
    variables = init_variables(model, 3)
    save_weights(path, model, variables, {"preprocessing": describe("finetune", 32)})
    return path


def _run(monkeypatch, photos, workdir, **overrides) -> int:
    monkeypatch.setattr(command.startup, "tune", lambda argv, *, enabled=True: "tuning: none")
    settings = SMALL | {"data.dir": photos} | overrides
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    recipe = f"{ROOT}/configs/folder.py:finetune"
    arguments = ["main", "--config", recipe, "--workdir", str(workdir), *flags]
    monkeypatch.setattr(sys, "argv", arguments)
    return command.main()


def _moved(before, after) -> set[str]:
    """Parts of the network of which a tensor differs: "params/stem", "batch_stats/head", ..."""
    return {
        f"{kind}/{part}"
        for kind in before
        for part in before[kind]
        if part != "classifier"
        and not jax.tree.all(jax.tree.map(np.array_equal, before[kind][part], after[kind][part]))
    }


def test_one_command_fine_tunes_from_a_file(monkeypatch, photos, weights, tmp_path, capsys):
    assert _run(monkeypatch, photos, tmp_path / "run", **{"init.weights": weights}) == 0
    told = capsys.readouterr().out
    assert f"tensors of {weights}; the classifier is new (2 classes instead of 10)" in told
    model, variables, info = load_weights(tmp_path / "run" / "final.safetensors")
    assert model.num_classes == 2
    assert info["labels"] == ["ants", "bees"]
    assert info["preprocessing"]["kind"] == "finetune"
    before = load_weights(weights)[1]
    assert len(_moved(before, variables)) == len(before["params"]) - 1 + len(before["batch_stats"])


def test_linear_probe_trains_the_classifier_alone(monkeypatch, photos, weights, tmp_path):
    frozen = {"init.weights": weights, "init.freeze": "(?!classifier)"}
    assert _run(monkeypatch, photos, tmp_path / "run", **frozen) == 0
    _, variables, _ = load_weights(tmp_path / "run" / "final.safetensors")
    assert _moved(load_weights(weights)[1], variables) == set()
    records = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(records[-1])["step"] >= 4


def test_one_command_fine_tunes_from_released_weights(monkeypatch, photos, tmp_path, capsys):
    row = Released(
        model="testing", weights="tiny", path="tiny.tgz", num_classes=10, image_size=32,
        preprocessing="v2", top1=None,
    )  # fmt: skip
    monkeypatch.setattr(released, "RELEASED", (row,))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("EFFV2_MIRROR", str(reference.DATA / "checkpoints"))
    assert _run(monkeypatch, photos, tmp_path / "run", **{"init.weights": "testing:tiny"}) == 0
    told = capsys.readouterr().out
    assert "tensors of testing:tiny; the classifier is new (2 classes instead of 10)" in told
    assert "their images were made as 'v2', the run's are 'finetune'" in told
    assert (tmp_path / "run" / "final.safetensors").is_file()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"init.weights": "testing:big"}, "init.weights = testing:big: no weights of 'testing'"),
        ({"init.weights": "gone.safetensors"}, "init.weights = 'gone.safetensors': no such file"),
        ({"data.preprocessing": "v1"}, "set --config.data.preprocessing=finetune"),
        ({"model.width": "2"}, "set --config.model.width=1.0"),
        ({"model.padding": "SYMMETRIC"}, "set --config.model.padding=SAME"),
        ({"init.freeze": "stem2"}, "init.freeze: 'stem2' matches no parameter"),
    ],
)
def test_what_does_not_fit_is_one_line(
    monkeypatch, photos, weights, tmp_path, capsys, overrides, says
):
    settings = {"init.weights": weights} | overrides
    assert _run(monkeypatch, photos, tmp_path / "run", **settings) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
