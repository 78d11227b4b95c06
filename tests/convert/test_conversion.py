"""What converters share: the account, the table, the command and its errors."""

import dataclasses
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from effv2_jax import UserError, create_model, load_weights
from effv2_jax.convert import conversion as conversions
from effv2_jax.convert import tf_checkpoint, tf_export
from effv2_jax.convert.conversion import Conversion, command, default_info, sha256_of
from effv2_jax.convert.weights_file import read_info
from effv2_jax.data import imagenet
from effv2_jax.models.initial_variables import init_variables

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A checkpoint of the network "testing" with three classes, raw variables and averages."""
    model = create_model("testing", 3)
    prefix = tmp_path_factory.mktemp("checkpoint") / "model"
    tensors = tf_export.official_tensors(model, init_variables(model, 0), averages=True)
    tf_export.export(tensors, prefix, format="checkpoint")
    return prefix


@pytest.fixture(scope="module")
def converted(checkpoint) -> Conversion:
    return tf_checkpoint.convert(checkpoint, model="testing")


def run(*arguments, forward=None) -> int:
    return command(
        [str(argument) for argument in arguments],
        description="Converts.",
        convert=tf_checkpoint.convert,
        forward=forward,
        flags={"--ema": {"choices": tf_checkpoint.EMA, "default": "auto"}},
    )


def test_the_command_writes_the_file_and_tells_what_became_of_every_tensor(
    checkpoint, converted, tmp_path, capsys
):
    out = tmp_path / "w.safetensors"
    assert run(checkpoint, out, "--model", "testing") == 0
    told = capsys.readouterr().out
    rows = {line[:12].strip(): line[12:] for line in told.splitlines()}
    count = converted.num_read // 2
    assert rows["source"] == "model (tensorflow)"
    assert rows["model"] == "testing, 3 classes, 32 px, preprocessing v2"
    assert rows["read"] == f"{2 * count} tensors"
    assert rows["mapped"] == f"{count} tensors, the ema weights"
    assert rows["left out"] == f"raw variables {count}"
    assert "read back: equal bit by bit" in rows["written"]
    assert sha256_of(out) in told
    source = read_info(out)["source"]
    assert source["sha256"] in told
    assert source == converted.info["source"]
    model, variables, _ = load_weights(out)
    assert model == converted.model
    np.testing.assert_array_equal(
        variables["params"]["classifier"]["bias"],
        converted.variables["params"]["classifier"]["bias"],
    )


def test_what_the_flags_say_is_in_the_file(checkpoint, tmp_path):
    out = tmp_path / "w.safetensors"
    labels = tmp_path / "labels.txt"
    labels.write_text("cat\ndog\nÄrmelkanal\n", encoding="utf-8")
    flags = ("--labels", labels, "--preprocessing", "advprop", "--image-size", "64")
    assert run(checkpoint, out, "--model", "testing", "--ema", "raw", *flags) == 0
    info = read_info(out)
    assert info["labels"] == ["cat", "dog", "Ärmelkanal"]
    assert (info["image_size"], info["preprocessing"]["kind"]) == (64, "advprop")
    assert info["source"]["weights"] == "raw"
    (tmp_path / "labels.json").write_text(json.dumps(["a", "b", "c"]))
    assert run(checkpoint, out, "--model", "testing", "--labels", tmp_path / "labels.json") == 0
    assert read_info(out)["labels"] == ["a", "b", "c"]


def test_another_image_size_changes_the_usual_crop(checkpoint, tmp_path):
    out = tmp_path / "w.safetensors"
    for size, crop in (("319", "central"), ("320", "none")):
        assert run(checkpoint, out, "--model", "testing", "--image-size", size) == 0
        assert read_info(out)["preprocessing"]["crop"] == crop


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("nothing w.safetensors --model testing", "nothing: no such checkpoint"),
        ("@ w.safetensors --model tasting", "did you mean 'testing'"),
        ("@ w.safetensors --model efficientnetv2-b0", "not the weights of efficientnetv2-b0"),
        ("@ w.safetensors --model testing --num-classes 5", "has 3 classes, expected 5"),
        ("@ w.safetensors --model testing --num 5", "--num"),
        ("@ w.safetensors --model testing --ema no", "--ema"),
        ("@ w.safetensors", "--model"),
        ("@ w.bin --model testing", "expected the name of a .safetensors file"),
        ("@ none/w.safetensors --model testing", "there is no folder"),
        ("@ w.safetensors --model testing --labels none", "cannot be read as labels"),
        ("@ w.safetensors --model testing --labels two", "2 labels, the weights have 3 classes"),
        ("@ w.safetensors --model testing --labels a.json", "a JSON list of names"),
        ("@ w.safetensors --model testing --preprocessing v3", "--preprocessing: found 'v3'"),
        ("@ w.safetensors --model testing --image-size 0", "--image-size: found 0"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(
    checkpoint, tmp_path, monkeypatch, capsys, arguments, told
):
    monkeypatch.chdir(tmp_path)
    Path("two").write_text("a\nb\n")
    Path("a.json").write_text('{"a": 1}')
    assert run(*(checkpoint if word == "@" else word for word in arguments.split())) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert told in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "two"]


def test_parity_is_measured_and_told(checkpoint, converted, tmp_path, capsys):
    scale = {"value": 1.0}

    def forward(path):
        assert path == str(checkpoint)
        return lambda found, images: (
            scale["value"] * np.asarray(found.model.apply(found.variables, images))
        )

    out = tmp_path / "w.safetensors"
    for value in (1.0, 2.0):
        scale["value"] = value
        arguments = (checkpoint, out, "--model", "testing", "--check-parity")
        assert run(*arguments, forward=forward) == 0
        line = capsys.readouterr().out.splitlines()[-1]
        assert line.startswith("parity      largest deviation of the logits ")
        deviation = float(line.split()[-4])
        assert deviation < 1e-4 if value == 1 else deviation > 0.1


def test_a_framework_that_is_not_installed_is_told_before_anything_is_read(tmp_path, capsys):
    def forward(path):
        raise UserError("--check-parity needs it: pip install it")

    arguments = ("nothing", tmp_path / "w.safetensors", "--model", "testing", "--check-parity")
    assert run(*arguments, forward=forward) == 2
    assert capsys.readouterr().err == "error: --check-parity needs it: pip install it\n"


def test_a_full_disk_leaves_the_old_file(checkpoint, tmp_path):
    """A limit on the size of files stands for the full disk."""
    out = tmp_path / "w.safetensors"
    out.write_bytes(b"old")
    script = """
        import resource, signal, sys
        sys.path.insert(0, "tools")
        import convert_tf_checkpoint
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        sys.exit(convert_tf_checkpoint.main([*sys.argv[1:], "--model", "testing"]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(checkpoint), str(out)],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: {out}: cannot be written: ")
    assert out.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_an_interrupted_write_leaves_the_old_file(converted, tmp_path, monkeypatch):
    out = tmp_path / "w.safetensors"
    out.write_bytes(b"old")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("effv2_jax.convert.weights_file._verify", interrupted)
    with pytest.raises(KeyboardInterrupt):
        conversions.write(converted, out)
    assert out.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_a_file_that_reads_back_differently_is_not_kept(converted, tmp_path, monkeypatch):
    import safetensors.numpy

    original = safetensors.numpy.save_file

    def spoiled(tensors, path, metadata):
        first = next(iter(tensors))
        original({**tensors, first: tensors[first] + 1}, path, metadata)

    monkeypatch.setattr(safetensors.numpy, "save_file", spoiled)
    with pytest.raises(UserError, match="1 tensors read back differently"):
        conversions.write(converted, tmp_path / "w.safetensors")
    assert not list(tmp_path.iterdir())


def test_an_account_that_does_not_add_up_is_a_mistake_of_the_converter(converted):
    with pytest.raises(ValueError, match="left out"):
        dataclasses.replace(converted, num_read=converted.num_read + 1)


@pytest.mark.parametrize(
    ("outputs", "told"),
    [
        (0, "no classifier"),
        (3, "unknown, told as numbers (--labels FILE)"),
        (1000, "the 1,000 of ImageNet, by their number (--labels FILE for others)"),
        (
            21843,
            "the 21,843 of ImageNet, each for itself, by their number (--labels FILE for others)",
        ),
    ],
)
def test_outputs_of_imagenet_get_its_names_and_that_is_told(tmp_path, outputs, told):
    model = create_model("testing", outputs, blocks=("r1_k3_s2_e1_i8_o8_c1",), feature_size=8)
    tensors = tf_export.official_tensors(model, init_variables(model, 0))
    tf_export.export(tensors, tmp_path / "model", format="checkpoint")
    converted = tf_checkpoint.convert(tmp_path / "model", model=model)
    assert converted.info["labels"] == imagenet.labels(outputs)
    assert converted.info["source"].get("loss") == ("sigmoid" if outputs == 21843 else None)
    assert f"labels      {told}\n" in conversions.table(converted)


def test_labels_that_were_named_are_told(converted):
    for labels, told in ((["a", "b"], "2: a, b"), (["a", "b", "c", "d"], "4: a, b, c, ...")):
        named = dataclasses.replace(converted, info={**converted.info, "labels": labels})
        assert f"labels      {told}\n" in conversions.table(named)


def test_info_follows_the_table_of_networks():
    info = default_info("efficientnetv2-s", framework="x", file="a/b.tgz", sha256="0")
    assert (info["image_size"], info["preprocessing"]["kind"]) == (384, "v2")
    assert info["source"] == {"framework": "x", "file": "b.tgz", "sha256": "0", "weights": "raw"}
    info = default_info("efficientnet-b7", framework="x", file="a", sha256=None, image_size=224,
                        preprocessing="advprop")  # fmt: skip
    assert (info["image_size"], info["preprocessing"]["mean"]) == (224, [127.5] * 3)
