"""TensorFlow's checkpoint format: what TensorFlow wrote is read, what is damaged is noticed."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effv2_jax import UserError
from effv2_jax.convert.bundle_writer import write_bundle
from effv2_jax.convert.checkpoint_files import find
from effv2_jax.convert.sorted_table import read_table
from effv2_jax.convert.tensor_bundle import Bundle
from tests.convert import checkpoints


def read(*content: bytes) -> dict[str, np.ndarray]:
    bundle = Bundle(checkpoints.in_memory(*content))
    return bundle.read(bundle.entries)


def test_every_type_and_shape_that_tensorflow_wrote():
    bundle = Bundle(find(checkpoints.FOLDER / "dtypes"))
    tensors = bundle.read(bundle.entries)
    expected = {
        "bfloat16": np.arange(5).astype(ml_dtypes.bfloat16),
        "bool": np.array([True, False]),
        "empty": np.zeros((0, 3), np.float32),
        "float16": np.array([1.5], np.float16),
        "float32": np.array([[1, 2], [3, 4]], np.float32),
        "float64": np.array(3.14159265, np.float64),
        "int32": np.array([-1, 2], np.int32),
        "int64": np.array(-5, np.int64),
        "uint8": np.array([255], np.uint8),
    }
    assert set(tensors) == set(expected)
    for name, value in expected.items():
        assert tensors[name].dtype == value.dtype
        assert tensors[name].shape == value.shape
        np.testing.assert_allclose(tensors[name].astype(float), value.astype(float), rtol=1e-7)
    assert bundle.entries["complex64"].kind == ("TensorFlow's type 8", (1,))
    assert bundle.entries["strings"].kind == ("string", (3,))
    assert bundle.read_string("string") == b"one"
    with pytest.raises(UserError, match="strings is not one whole string"):
        bundle.read_string("strings")


def test_shards_are_put_together():
    tensors = read(*checkpoints.content("sharded"))
    assert len(tensors) == 6
    for i in range(3):
        np.testing.assert_array_equal(tensors[f"layer_{i}/a"], np.full((3, i + 1), i))
        np.testing.assert_array_equal(tensors[f"layer_{i}/b"], np.arange(4.0) * i)


def test_slices_are_refused_by_name():
    with pytest.raises(UserError, match="part is stored in slices") as error:
        read(*checkpoints.content("sliced"))
    assert "damaged" not in str(error.value)


def test_what_is_not_wanted_is_verified_but_not_kept():
    bundle = Bundle(checkpoints.in_memory(*checkpoints.content("full")))
    assert set(bundle.read({"global_step"})) == {"global_step"}
    index, data = checkpoints.content("damaged_flipped")
    with pytest.raises(UserError, match=r"wrong checksum of .*blocks_3/tpu_batch_normalization_1"):
        Bundle(checkpoints.in_memory(index, data)).read(set())


def test_all_damaged_tensors_are_counted():
    index, data = checkpoints.content("raw_noprefix")
    with pytest.raises(UserError, match=r"wrong checksum of .*, .* and \d+ more; copy"):
        read(index, bytes(len(data)))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_of_the_index_is_noticed(data):
    index, *shards = checkpoints.content("raw_noprefix")
    damaged = bytearray(index)
    damaged[data.draw(st.integers(0, len(index) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(UserError, match=r"memory.*(damaged|cannot be read)"):
        read(bytes(damaged), *shards)


def test_any_flipped_byte_of_the_footer_is_noticed():
    """The footer has no checksum: every bit of it is tried."""
    index, *shards = checkpoints.content("raw_noprefix")
    for at in range(len(index) - 48, len(index)):
        for bit in range(8):
            damaged = bytearray(index)
            damaged[at] ^= 1 << bit
            with pytest.raises(UserError):
                read(bytes(damaged), *shards)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_of_the_data_is_noticed_and_its_tensor_named(data):
    index, shard = checkpoints.content("raw_noprefix")
    at = data.draw(st.integers(0, len(shard) - 1))
    damaged = bytearray(shard)
    damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    entries = Bundle(checkpoints.in_memory(index, shard)).entries
    (hit,) = [key for key, e in entries.items() if e.offset <= at < e.offset + e.size]
    with pytest.raises(UserError, match=f"wrong checksum of {hit};"):
        read(index, bytes(damaged))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_truncation_is_noticed(data):
    index, shard = checkpoints.content("raw_noprefix")
    kept = data.draw(st.integers(0, len(index) - 1))
    with pytest.raises(UserError, match="damaged"):
        read(index[:kept], shard)
    kept = data.draw(st.integers(0, len(shard) - 1))
    with pytest.raises(UserError, match=f"cut off: .* has {kept:,} bytes of {len(shard):,}"):
        read(index, shard[:kept])


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=300))
def test_other_files_are_no_index(data):
    with pytest.raises(UserError, match="damaged"):
        read(data, b"")


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.dictionaries(
        st.text("ab/_é", min_size=1, max_size=40), st.lists(st.integers(0, 7), max_size=4),
        max_size=40,
    )
)  # fmt: skip
def test_what_is_written_is_read(shapes, tmp_path_factory):
    prefix = tmp_path_factory.mktemp("bundle") / "model"
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    write_bundle(prefix, tensors)
    bundle = Bundle(find(prefix))
    found = bundle.read(bundle.entries)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].shape == tensor.shape
        np.testing.assert_array_equal(found[name], tensor)


def test_many_blocks_of_an_index_are_written_and_read(tmp_path):
    tensors = {f"layer_{i}/kernel": np.full(1, i, np.float32) for i in range(2000)}
    write_bundle(tmp_path / "model", tensors)
    index = (tmp_path / "model.index").read_bytes()
    assert len(index) > 10 * 4096
    assert list(read_table(index)) == [b"", *sorted(name.encode() for name in tensors)]


def test_only_float32_is_written(tmp_path):
    with pytest.raises(UserError, match="not float32: a"):
        write_bundle(tmp_path / "model", {"a": np.zeros(3)})
    assert not list(tmp_path.iterdir())
