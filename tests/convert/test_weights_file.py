"""The weights file: everything comes back, everything wrong is named, nothing is half-written."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import effv2_jax
from effv2_jax import UserError, create_model, load_weights, save_weights
from effv2_jax.convert.weights_file import read_info
from effv2_jax.models.initial_variables import init_variables

ROOT = Path(__file__).resolve().parents[2]

INFO = {
    "image_size": 40,
    "preprocessing": {
        "kind": "v2",
        "mean": [128.0, 128.0, 128.0],
        "std": [128.0, 128.0, 128.0],
        "crop": "central",
        "interpolation": "bilinear",
    },
    "labels": ["cat", "dog", "Ärmelkanal"],
    "source": {"framework": "effv2_jax", "file": "run", "sha256": None, "weights": "ema"},
    "metrics": {"top1": 0.875},
}


@pytest.fixture
def saved(tmp_path, model, variables):
    path = tmp_path / "weights.safetensors"
    save_weights(path, model, variables, INFO)
    return path


def rewrite(path: Path, *, tensors=None, header=None, metadata=None) -> None:
    """Writes the file anew with changes: functions of the tensors and of the header."""
    with safetensors.safe_open(path, framework="numpy") as file:
        content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        info = json.loads(file.metadata()["effv2_jax"])
    if tensors:
        content = tensors(content)
    if header:
        header(info)
    metadata = {"effv2_jax": json.dumps(info)} if metadata is None else metadata
    safetensors.numpy.save_file(content, path, metadata)


def message_of(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_weights(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))
    return str(caught.value)


def test_everything_comes_back(saved, model, variables):
    loaded_model, loaded, info = load_weights(saved)
    assert loaded_model == model
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)
    for ours, theirs in zip(jax.tree.leaves(variables), jax.tree.leaves(loaded), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert theirs.dtype == jnp.float32
    assert {key: info[key] for key in INFO} == INFO
    assert (info["model"], info["num_classes"], info["format"]) == ("testing", 3, 1)
    assert set(info["created_with"]) == {"effv2_jax", "jax", "flax"}


def test_any_safetensors_reader_finds_float32_tensors_under_our_paths(saved, variables):
    tensors = safetensors.numpy.load_file(saved)
    np.testing.assert_array_equal(
        tensors["params/stem/conv/kernel"], variables["params"]["stem"]["conv"]["kernel"]
    )
    assert "batch_stats/head/norm/var" in tensors
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype("float32")}
    assert len(tensors) == len(jax.tree.leaves(variables))


def test_loading_and_saving_again_gives_equal_bytes(saved, tmp_path):
    save_weights(tmp_path / "again.safetensors", *load_weights(saved))
    assert (tmp_path / "again.safetensors").read_bytes() == saved.read_bytes()


def test_read_info_reads_the_header_alone(saved):
    assert read_info(saved) == load_weights(saved)[2]


@pytest.mark.parametrize(
    "overrides",
    [
        {"width": 0.5, "depth": 2.0},
        {"blocks": ("r1_k3_s2_e1_i24_o16_c1", "r2_k5_s2_e4_i16_o24_se0.3333333333333333")},
        {"activation": "relu6", "bn_epsilon": 1e-5, "padding": "SYMMETRIC", "head_bias": -4.6},
        {"survival_prob": 0.7, "dropout_rate": 0.0, "bn_momentum": 0.99, "bn_unbiased": False},
    ],
)
def test_changed_networks_come_back(tmp_path, overrides):
    model = create_model("testing", 0, **overrides)
    save_weights(tmp_path / "w.safetensors", model, init_variables(model, 0), {})
    assert load_weights(tmp_path / "w.safetensors")[0] == model


def test_how_it_is_computed_is_not_part_of_the_weights(tmp_path, model, variables):
    fast = model.clone(
        dtype=jnp.bfloat16,
        remat=True,
        remat_fused=False,
        remat_norms=True,
        lowering="plain",
        axis_name="data",
        channel_parallel=2,
    )
    save_weights(tmp_path / "w.safetensors", fast, variables, {})
    assert load_weights(tmp_path / "w.safetensors")[0] == model


def test_what_is_not_told_has_defaults(tmp_path, model, variables):
    save_weights(tmp_path / "w.safetensors", model, variables)
    info = read_info(tmp_path / "w.safetensors")
    assert info["image_size"] > 0
    assert (info["preprocessing"], info["labels"], info["source"]) == (None, None, None)


def test_numbers_of_any_kind_are_kept_and_nan_is_null(tmp_path, model, variables):
    """A run must not fail to write its last file because of a metric."""
    metrics = {"a": np.float32(0.5), "b": jnp.float32(0.25), "c": float("nan"), "d": (1, True)}
    save_weights(tmp_path / "w.safetensors", model, variables, {"metrics": metrics})
    assert read_info(tmp_path / "w.safetensors")["metrics"] == {
        "a": 0.5,
        "b": 0.25,
        "c": None,
        "d": [1, True],
    }


def test_all_wrong_tensors_are_named_at_once(saved):
    def spoil(tensors):
        tensors = dict(tensors)
        del tensors["params/stem/conv/kernel"]
        tensors["params/other"] = np.zeros(3, np.float32)
        tensors["params/classifier/bias"] = np.zeros(4, np.float32)
        tensors["params/head/norm/scale"] = tensors["params/head/norm/scale"].astype(np.float16)
        tensors["batch_stats/stem/norm/var"] = tensors["batch_stats/stem/norm/var"].copy()
        tensors["batch_stats/stem/norm/var"][:2] = [np.nan, np.inf]
        return tensors

    channels = load_weights(saved)[1]["params"]["head"]["norm"]["scale"].size
    rewrite(saved, tensors=spoil)
    message = message_of(saved)
    assert "1 missing: params/stem/conv/kernel" in message
    assert "1 unexpected: params/other" in message
    assert "params/classifier/bias is float32[4], expected float32[3]" in message
    assert f"params/head/norm/scale is F16[{channels}], expected float32[{channels}]" in message
    assert "1 not finite: batch_stats/stem/norm/var (2 of " in message


def test_long_lists_are_cut(saved):
    rewrite(saved, tensors=lambda tensors: dict(list(tensors.items())[:1]))
    message = message_of(saved)
    assert "more" in message
    assert len(message) < 1000


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.1, 0.9, 0.9999])
def test_truncated_file_is_noticed(saved, kept):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(kept * len(content))])
    assert "not a whole safetensors file" in message_of(saved)


@pytest.mark.parametrize("content", [b"PK\x03\x04" * 500, b"\x00" * 500, b"{}", b"hello\n" * 99])
def test_other_files_are_noticed(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert "not a whole safetensors file" in message_of(path)


def test_missing_file_and_folder_are_clear_errors(tmp_path):
    assert "no such file" in message_of(tmp_path / "none.safetensors")
    assert "a folder" in message_of(tmp_path)


def test_safetensors_of_others_point_to_the_converters(tmp_path):
    for metadata in ({"format": "pt"}, None):
        safetensors.numpy.save_file({"a": np.zeros(3)}, tmp_path / "a.safetensors", metadata)
        assert "tools/convert_" in message_of(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda info: info.update(format=2), "format 2, this version of effv2_jax reads 1"),
        (lambda info: info.pop("format"), "format None"),
        (lambda info: info.pop("model"), "its header lacks model"),
        (lambda info: info.update(model="resnet50"), "resnet50"),
        (lambda info: info["overrides"].update(breadth=2), "unknown override 'breadth'"),
        (lambda info: info.update(num_classes="many"), "num_classes"),
        (lambda info: info.update(num_classes=-1), "num_classes is -1"),
        (lambda info: info.update(overrides=[1]), "overrides"),
        (lambda info: info["overrides"].update(width="wide"), "describes no known network"),
        (lambda info: info.update(image_size=0), "image_size is 0, expected pixels"),
        (lambda info: info.update(image_size="big"), "image_size is 'big', expected pixels"),
        (lambda info: info["labels"].pop(), "2 labels for 3 classes"),
        (lambda info: info.update(labels=7), "labels is 7, expected a list of names or null"),
        (lambda info: info.update(labels=[1, 2, 3]), "labels is [1, 2, 3]"),
        (lambda info: info.update(source="here"), "source is 'here'"),
        (lambda info: info.update(metrics=[1]), "metrics is [1]"),
        (lambda info: info.update(preprocessing="v2"), "has 'v2', expected"),
        (lambda info: info["preprocessing"].pop("std"), "has ['crop', 'interpolation', 'kind',"),
        (lambda info: info["preprocessing"].update(std=[1, 0, 1]), "std is [1, 0, 1]"),
        (lambda info: info["preprocessing"].update(mean=["a", 0, 1]), "mean is ['a', 0, 1]"),
        (lambda info: info["preprocessing"].update(kind=None), "kind is None, expected a name"),
    ],
)
def test_wrong_headers_are_clear_errors(saved, change, expected):
    rewrite(saved, header=change)
    assert expected in message_of(saved)


def test_all_that_is_wrong_in_a_header_is_told_at_once(saved):
    rewrite(saved, header=lambda info: info.update(labels=7, image_size=None, source=1))
    message = message_of(saved)
    assert all(f"{key} is " in message for key in ("labels", "image_size", "source"))


@pytest.mark.parametrize("text", ["{", "3", "[1, 2]", "null"])
def test_damaged_headers_are_clear_errors(saved, text):
    rewrite(saved, metadata={"effv2_jax": text})
    assert "its header is damaged" in message_of(saved)


def test_wrong_variables_are_not_written(saved, model, variables):
    before = saved.read_bytes()
    broken = jax.tree.map(np.array, variables)
    broken["params"]["stem"]["conv"]["kernel"][0, 0, 0, 0] = np.nan
    for wrong, expected in (
        (broken, "1 not finite: params/stem/conv/kernel (1 of "),
        ({"params": variables["params"]}, "missing: batch_stats/"),
        (init_variables(create_model("testing", 5), 0), "params/classifier/bias is float32[5]"),
    ):
        with pytest.raises(UserError) as caught:
            save_weights(saved, model, wrong, INFO)
        assert expected in str(caught.value)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"lables": ["a"]}, "info has 'lables'"),
        ({"labels": ["a", "b"]}, "2 labels for 3 classes"),
        ({"preprocessing": {"kind": "v2"}}, "info['preprocessing'] has ['kind']"),
        ({"source": {"file": Path("a")}}, "JSON cannot keep: a PosixPath"),
    ],
)
def test_inconsistent_info_is_not_written(tmp_path, model, variables, change, expected):
    with pytest.raises(UserError) as caught:
        save_weights(tmp_path / "w.safetensors", model, variables, {**INFO, **change})
    assert expected in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_interrupted_write_leaves_the_old_file(saved, model, variables, monkeypatch):
    before = saved.read_bytes()

    def interrupted(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.numpy, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_weights(saved, model, variables, INFO)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_full_disk_leaves_the_old_file(saved):
    """A file-size limit stands for the full disk: the same kind of failing write."""
    script = """
        import resource, signal, sys, effv2_jax
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        loaded = effv2_jax.load_weights(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        try:
            effv2_jax.save_weights(sys.argv[1], *loaded)
        except effv2_jax.UserError as error:
            print(error)
    """
    before = saved.read_bytes()
    assert len(before) > 20_000
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(saved)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert run.stdout.startswith(f"{saved}: cannot be written: "), run.stderr
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_folder_that_does_not_exist_is_a_clear_error(tmp_path, model, variables):
    with pytest.raises(UserError, match=r"cannot be written: .*No such file or directory"):
        save_weights(tmp_path / "none/w.safetensors", model, variables)


def test_the_names_are_public():
    assert effv2_jax.save_weights is save_weights
    assert effv2_jax.load_weights is load_weights
