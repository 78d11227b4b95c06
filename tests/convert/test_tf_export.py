"""Our weights under official names: there and back changes no bit."""

import resource
import signal

import jax
import numpy as np
import pytest

from effv2_jax import UserError, create_model
from effv2_jax.convert import tf_checkpoint, tf_export
from effv2_jax.convert.checkpoint_files import find
from effv2_jax.convert.tensor_bundle import Bundle
from effv2_jax.models.initial_variables import init_variables


@pytest.mark.parametrize("averages", [False, True])
@pytest.mark.parametrize("prefix", [None, "", "some/name"])
def test_a_checkpoint_comes_back_bit_by_bit(tmp_path, model, variables, prefix, averages):
    tensors = tf_export.official_tensors(model, variables, prefix=prefix, averages=averages)
    files = tf_export.export(tensors, tmp_path / "model", format="checkpoint")
    assert all(path.is_file() for path in files)
    conversion = tf_checkpoint.convert(tmp_path, model="testing")
    assert conversion.info["source"]["weights"] == ("ema" if averages else "raw")
    assert conversion.model == model
    assert jax.tree.structure(conversion.variables) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, conversion.variables, variables)


def test_a_dictionary_comes_back_bit_by_bit(tmp_path, model, variables):
    tensors = tf_export.official_tensors(model, variables)
    tf_export.export(tensors, tmp_path / "any.name", format="npz")
    with np.load(tmp_path / "any.name") as found:
        assert set(found.files) == set(tensors)
        assert "testing/blocks_3/depthwise_conv2d/depthwise_kernel" in found.files
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(found[name], tensor)


def test_a_checkpoint_that_is_exported_beside_another_does_not_change_its_choice(
    tmp_path, model, variables
):
    tensors = tf_export.official_tensors(model, variables)
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "old"\n')
    (tmp_path / "old.index").write_bytes(b"")
    tf_export.export(tensors, tmp_path / "new", format="checkpoint")
    assert find(tmp_path).where == str(tmp_path / "old")


@pytest.mark.parametrize(
    ("overrides", "told"),
    [({"padding": "SYMMETRIC"}, "padding"), ({"bn_epsilon": 1e-5}, "epsilon")],
)
def test_what_the_official_code_cannot_compute_is_refused(overrides, told):
    model = create_model("testing", 3, **overrides)
    with pytest.raises(UserError, match=told):
        tf_export.official_tensors(model, init_variables(model, 0))


@pytest.mark.parametrize("format", tf_export.FORMATS)
def test_a_full_disk_leaves_what_was_there(tmp_path, model, variables, format):
    """A limit on the size of files stands for the full disk."""
    tensors = tf_export.official_tensors(model, variables)
    files = tf_export.export(tensors, tmp_path / "model", format=format)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot be written"):
            tf_export.export(tensors, tmp_path / "model", format=format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    if format == "checkpoint":
        assert len(files) == 2
        assert len(Bundle(find(tmp_path)).entries) == len(tensors)
