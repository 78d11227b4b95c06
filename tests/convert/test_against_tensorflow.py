"""The reader, the writer and the forward pass against TensorFlow itself, where it is installed."""

import jax
import numpy as np
import pytest

from effv2_jax import create_model
from effv2_jax.convert import tf_checkpoint, tf_export, tf_forward
from effv2_jax.convert.checkpoint_files import find
from effv2_jax.convert.conversion import parity
from effv2_jax.convert.tensor_bundle import Bundle
from effv2_jax.models.initial_variables import init_variables
from tests.convert import checkpoints

tf = pytest.importorskip("tensorflow", reason="compares with TensorFlow: pip install tensorflow")


@pytest.mark.parametrize(
    "name", ["full", "full_head_1", "ema_only", "raw_noprefix", "object", "sharded"]
)
def test_every_tensor_is_what_tensorflow_reads(name):
    files = find(checkpoints.FOLDER / name)
    bundle = Bundle(files)
    tensors = bundle.read(bundle.entries)
    reader = tf.train.load_checkpoint(files.where)
    shapes = reader.get_variable_to_shape_map()
    assert {key: list(entry.shape) for key, entry in bundle.entries.items()} == shapes
    for key in shapes:
        expected = reader.get_tensor(key)
        if isinstance(expected, bytes):
            assert bundle.read_string(key) == expected
        else:
            np.testing.assert_array_equal(tensors[key], expected, err_msg=key)
            assert tensors[key].dtype == expected.dtype


def test_what_is_exported_is_what_tensorflow_reads(tmp_path):
    model = create_model("testing", 3)
    tensors = tf_export.official_tensors(model, init_variables(model, 0), averages=True)
    tf_export.export(tensors, tmp_path / "model", format="checkpoint")
    reader = tf.train.load_checkpoint(str(tmp_path))
    assert set(reader.get_variable_to_shape_map()) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(reader.get_tensor(name), tensor, err_msg=name)


@pytest.mark.parametrize("name", ["full", "object", "tiny.tgz"])
@pytest.mark.parametrize("ema", ["raw", "auto"])
def test_logits_equal_those_of_plain_tensorflow_operations(name, ema):
    path = checkpoints.FOLDER / name
    conversion = tf_checkpoint.convert(path, model=checkpoints.network(), ema=ema)
    assert parity(conversion, tf_forward.forward(path)) < 2e-5  # largest; rounding: 3e-6


def test_parity_notices_one_wrong_value():
    path = checkpoints.FOLDER / "full"
    conversion = tf_checkpoint.convert(path, model=checkpoints.network())
    changed = jax.tree.map(np.array, conversion.variables)
    changed["params"]["blocks_3"]["se"]["reduce"]["bias"][0] += 1
    conversion.variables.update(changed)
    assert parity(conversion, tf_forward.forward(path)) > 1e-3
