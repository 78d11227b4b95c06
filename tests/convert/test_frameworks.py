"""Weights of Keras, timm and torchvision: every tensor accounted for, the same logits."""

import dataclasses
import shutil
import sys
import zipfile

import jax
import numpy as np
import pytest
import safetensors.numpy

from effv2_jax import load_weights, save_weights
from effv2_jax.convert import names_keras, names_tf, names_timm, names_torchvision
from effv2_jax.convert.mapping import expected_there
from effv2_jax.data.kinds import describe, get_kind, kind_of
from effv2_jax.errors import UserError
from effv2_jax.models.initial_variables import init_variables
from effv2_jax.models.network import create_model
from effv2_jax.models.variants import list_models
from tests import reference
from tests.convert.frameworks import CONVERTERS, FOLDER, convert, images, logits, network

# Our float32 against float64 (PyTorch) or float32 (Keras), relative to the logits' deviation. The
# random weights amplify rounding: PyTorch's own float32 is 7e-5 away, ours 9e-6 to 3.5e-5, by the
# version of JAX. Another epsilon costs 7e-4 and more, another padding 0.2.
TOLERANCE = 1e-4


def _sources():
    for framework, module in CONVERTERS.items():
        for source in module.SOURCES:
            yield pytest.param(module, source, id=f"{framework}-{source.name}")


def _deviation(conversion, inputs, name) -> float:
    found = jax.jit(conversion.model.apply)(conversion.variables, inputs)
    return float(np.max(np.abs(found - logits(name))) / np.std(logits(name)))


@pytest.mark.parametrize("file", ["timm_tf.safetensors", "timm_rw.pth", "torchvision.pth",
                                  "keras_v2.weights.h5"])  # fmt: skip
def test_logits_equal_those_of_the_framework(file):
    if file.startswith("keras"):
        pytest.importorskip("h5py", reason="reads HDF5")
    conversion = convert(file)
    assert _deviation(conversion, images(), file.split(".")[0]) < TOLERANCE
    assert conversion.num_read == len(jax.tree.leaves(conversion.variables)) + sum(
        conversion.left_out.values()
    )


@pytest.mark.parametrize("file", ["keras_v1.weights.h5", "keras_v1.h5"])
def test_what_keras_v1_does_to_images_is_in_the_preprocessing(file):
    pytest.importorskip("h5py", reason="reads HDF5")
    conversion = convert(file)
    kind = kind_of(conversion.info["preprocessing"], image_size=conversion.info["image_size"])
    np.testing.assert_allclose(kind.mean, 255 * np.array([0.1, 0.2, 0.3]), rtol=1e-6)
    np.testing.assert_allclose(kind.std, 255 * np.sqrt([0.3, 0.4, 0.5]), rtol=1e-6)
    pixels = (images() + 1) * 127.5
    inputs = (pixels - np.float32(kind.mean)) / np.float32(kind.std)
    assert _deviation(conversion, inputs, "keras_v1") < TOLERANCE
    assert conversion.left_out["input normalisation"] == 3


@pytest.mark.parametrize("variance", [(0.229, 0.224, 0.225), (0.229**2, 0.224**2, 0.225**2)])
def test_the_released_weights_of_keras_v1_have_the_official_preprocessing(tmp_path, variance):
    """Their "variance" is the deviation: tensorflow issue 49930."""
    h5py = pytest.importorskip("h5py", reason="writes HDF5")
    path = tmp_path / "efficientnetb0.h5"
    shutil.copy(FOLDER / "keras_v1.h5", path)
    with h5py.File(path, "r+") as file:
        values = file["model_weights/normalization/normalization"]
        values["mean"][...] = (0.485, 0.456, 0.406)
        values["variance"][...] = variance
    conversion = names_keras.convert(path, model=network("keras_v1"))
    size = conversion.info["image_size"]
    assert conversion.info["preprocessing"] == describe(
        conversion.info["preprocessing"]["kind"], size
    )
    assert conversion.info["preprocessing"]["kind"] != "finetune"


def test_another_padding_or_epsilon_would_be_noticed():
    conversion = convert("timm_rw.pth")
    for change in ({"padding": "SAME"}, {"bn_epsilon": 1e-3}):
        other = dataclasses.replace(conversion, model=conversion.model.clone(**change))
        assert _deviation(other, images(), "timm_rw") > 100 * TOLERANCE


@pytest.mark.parametrize("files", [("timm_rw.pth", "timm_rw_legacy.pth"),
                                   ("keras_v1.weights.h5", "keras_v1.h5")])  # fmt: skip
def test_every_layout_of_a_file_gives_the_same_weights(files):
    if files[0].startswith("keras"):
        pytest.importorskip("h5py", reason="reads HDF5")
    one, other = (convert(file).variables for file in files)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_keras_archive_is_opened(tmp_path):
    pytest.importorskip("h5py", reason="reads HDF5")
    with zipfile.ZipFile(tmp_path / "a.keras", "w") as archive:
        archive.write(FOLDER / "keras_v2.weights.h5", "model.weights.h5")
    found = names_keras.convert(tmp_path / "a.keras", model=network("keras_v2"))
    jax.tree.map(
        np.testing.assert_array_equal, found.variables, convert("keras_v2.weights.h5").variables
    )
    assert found.left_out["optimizer slots"] > 0


@pytest.mark.parametrize(("module", "source"), list(_sources()))
def test_the_names_of_every_network_are_one_to_one(module, source):
    model = create_model(source.model, 1000, **source.overrides)
    names = module.tensor_names(model)
    assert len({name.theirs for name in names}) == len({name.path for name in names}) == len(names)
    if model.variant in list_models():  # an independent list of the paths
        official = names_tf.tensor_names(model.block_specs)
        assert {name.path for name in names} == {name.path for name in official}
    get_kind(source.preprocessing)


@pytest.mark.parametrize(
    ("module", "name"),
    [(names_timm, "timm_tf"), (names_timm, "timm_rw"), (names_torchvision, "torchvision"),
     (names_keras, "keras_v2"), (names_keras, "keras_v1")],
)  # fmt: skip
@pytest.mark.parametrize("num_classes", [0, 5])
def test_the_names_are_those_of_all_variables(module, name, num_classes):
    model = network(name).clone(num_classes=num_classes)
    expected_there(module.tensor_names(model), model)  # raises where not one to one


def test_v1_b3_is_the_one_that_was_released():
    """Its first stage has 24 channels everywhere but in the V2 code."""
    for module in CONVERTERS.values():
        (source, *_) = (s for s in module.SOURCES if s.model == "efficientnet-b3")
        model = create_model(source.model, **source.overrides)
        assert [spec.channels for spec in model.block_specs[:5]] == [24, 24, 32, 32, 32]
        assert [spec.se_channels for spec in model.block_specs[:3]] == [10, 6, 6]
    assert create_model("efficientnet-b3").block_specs[0].channels == 16


def test_export_to_timm_and_back_is_exact(tmp_path, monkeypatch, capsys):
    tools = _tools(monkeypatch, "export_timm", "convert_timm")
    model = create_model("efficientnetv2-b0", 3, width=0.25)
    weights = tmp_path / "w.safetensors"
    save_weights(weights, model, init_variables(model, 0), {})
    theirs = tmp_path / "timm.safetensors"
    assert tools["export_timm"].main([str(weights), str(theirs)]) == 0
    assert "timm has no network" in capsys.readouterr().out
    again = names_timm.convert(theirs, model=model)
    jax.tree.map(np.testing.assert_array_equal, again.variables, load_weights(weights)[1])
    tensors = safetensors.numpy.load_file(theirs)
    assert tensors["conv_stem.weight"].shape == (8, 3, 3, 3)
    assert tensors["blocks.3.0.conv_dw.weight"].shape[1:] == (1, 3, 3)


def test_timms_name_is_that_of_the_same_architecture_only():
    assert names_timm.timm_name(create_model("efficientnetv2-s")) == "tf_efficientnetv2_s"
    assert names_timm.timm_name(create_model("efficientnetv2-rw-s")) == "efficientnetv2_rw_s"
    assert names_timm.timm_name(create_model("efficientnetv2-s", padding="SYMMETRIC")) is None
    assert names_timm.timm_name(create_model("efficientnet-b3")) is None


def _tools(monkeypatch, *names):
    monkeypatch.syspath_prepend(str(reference.DATA.parents[1] / "tools"))
    return {name: __import__(name) for name in names}


def test_the_command_writes_a_file_that_says_where_it_comes_from(tmp_path, monkeypatch, capsys):
    tool = _tools(monkeypatch, "convert_timm")["convert_timm"]
    source = create_model("efficientnetv2-b0", 2)
    tensors = names_timm.export(source, init_variables(source, 0))
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    out = tmp_path / "out.safetensors"
    arguments = [str(tmp_path / "model.safetensors"), str(out), "--model", "tf_efficientnetv2_b0"]
    assert tool.main(arguments) == 0
    assert "361 tensors" in capsys.readouterr().out
    model, _, info = load_weights(out)
    assert model == source
    assert info["source"]["framework"] == "timm"
    assert info["preprocessing"]["kind"] == "pillow-bicubic-0.875-imagenet"
    assert info["preprocessing"]["crop"] == "0.875"


@pytest.mark.parametrize(
    ("framework", "arguments", "expected"),
    [
        ("timm", "text.pth OUT --model tf_efficientnetv2_b0", "not a file of PyTorch"),
        ("timm", "none.pth OUT --model tf_efficientnetv2_b0", "no such file"),
        ("timm", "timm_rw.pth OUT --model tf_efficientnetv2_bo", "did you mean"),
        ("timm", "timm_rw.pth OUT --model tf_efficientnetv2_b0", "blocks.0.0.conv_exp.weight"),
        ("timm", "timm_rw.pth OUT --model efficientnetv2_rw_s --num-classes 7", "has 5 classes"),
        ("torchvision", "whole_model.pth OUT --model efficientnet_b0", "torch.nn.modules.linear"),
        ("torchvision", "torchvision.pth OUT --model efficientnet_b0", "missing"),
        ("keras", "text.h5 OUT --model EfficientNetB0", "text.h5"),
        ("keras", "keras_v2.weights.h5 OUT --model EfficientNetV2B0", "stem_conv/kernel is"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path, monkeypatch, capsys, framework, arguments, expected
):
    if framework == "keras":
        pytest.importorskip("h5py", reason="reads HDF5")
    tool = _tools(monkeypatch, f"convert_{framework}")[f"convert_{framework}"]
    for file in FOLDER.glob("*.*"):
        shutil.copy(file, tmp_path)
    for name in ("text.pth", "text.h5"):
        (tmp_path / name).write_text("not weights\n" * 50)
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out.safetensors"
    out.write_text("good")
    assert tool.main(arguments.replace("OUT", str(out)).split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert expected in error
    assert out.read_text() == "good"


def test_nan_and_wrong_shapes_are_named_together(tmp_path):
    tensors = safetensors.numpy.load_file(FOLDER / "timm_tf.safetensors")
    tensors["bn1.running_var"][3] = np.nan
    tensors["conv_head.weight"] = tensors["conv_head.weight"][:, :1]
    tensors["head.extra"] = np.zeros(2, np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError) as caught:
        names_timm.convert(tmp_path / "a.safetensors", model=network("timm_tf"))
    for part in (
        "1 unexpected: head.extra",
        "conv_head.weight is float32[32, 1, 1, 1], expected float32[32, 24, 1, 1]",
        "1 not finite: bn1.running_var (1 of 8 values)",
    ):
        assert part in str(caught.value)


def test_reading_hdf5_without_h5py_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match="needs h5py: pip install h5py"):
        convert("keras_v2.weights.h5")
