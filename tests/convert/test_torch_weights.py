"""Which tensors of a file of PyTorch are those of the network."""

import shutil

import numpy as np
import pytest
import safetensors.numpy

from effv2_jax.convert.torch_weights import read_torch_weights
from effv2_jax.errors import UserError
from tests import reference
from tests.convert.torch_pickles import mapping, number, save, tensor

FOLDER = reference.DATA / "frameworks"


def test_counters_are_left_out_and_counted():
    weights = read_torch_weights(FOLDER / "timm_rw.pth")
    counters = weights.left_out["num_batches_tracked"]
    assert counters > 10
    assert weights.num_read == len(weights.tensors) + counters
    assert not any("num_batches" in name for name in weights.tensors)


def test_the_moving_average_of_a_training_checkpoint_is_taken_and_said(tmp_path):
    body = mapping(
        epoch=number(1),
        state_dict=mapping(a=tensor()),
        state_dict_ema=mapping(a=tensor(offset=1, shape=(2,))),
    )
    path = save(tmp_path / "last.pth.tar", body)
    average = read_torch_weights(path)
    assert average.weights == "ema"
    assert "'state_dict_ema' of a training checkpoint" in average.notes[0]
    np.testing.assert_array_equal(average.tensors["a"], [1, 2])
    raw = read_torch_weights(path, key="state_dict")
    assert raw.weights == "raw"
    np.testing.assert_array_equal(raw.tensors["a"], np.arange(6))


def test_a_part_that_is_not_there_is_told_with_those_that_are(tmp_path):
    path = save(tmp_path / "a.pth", mapping(one=mapping(a=tensor()), two=mapping(a=tensor())))
    with pytest.raises(UserError, match=r"has 'one', 'two': choose one with --key"):
        read_torch_weights(path)
    with pytest.raises(UserError, match=r"no state dict 'three': it has 'one', 'two'"):
        read_torch_weights(path, key="three")
    with pytest.raises(UserError, match="leave --key out"):
        read_torch_weights(FOLDER / "timm_rw.pth", key="model")
    path = save(tmp_path / "b.pth", mapping(epoch=number(1)))
    with pytest.raises(UserError, match="no state dict in it"):
        read_torch_weights(path)


def test_prefixes_of_wrappers_are_taken_off_and_their_counters_out(tmp_path):
    body = mapping(module___orig_mod__stem__weight=tensor(), module___orig_mod__bias=tensor())
    weights = read_torch_weights(save(tmp_path / "a.pth", body))
    assert set(weights.tensors) == {"stem.weight", "bias"}
    body = mapping(model_ema=mapping(n_averaged=tensor(shape=(1,)), module__a=tensor()))
    weights = read_torch_weights(save(tmp_path / "b.pth", body))
    assert (set(weights.tensors), weights.left_out) == ({"a"}, {"n_averaged": 1})


def test_a_prefix_of_some_names_only_stays(tmp_path):
    body = mapping(module__a=tensor(), b=tensor())
    assert set(read_torch_weights(save(tmp_path / "a.pth", body)).tensors) == {"module.a", "b"}


def test_half_and_double_precision_become_float32_and_are_told():
    weights = read_torch_weights(FOLDER / "odd.pth")
    expected = reference.load_npz("frameworks/odd.npz")
    assert set(weights.notes) == {
        f"1 tensors were {dtype}: now float32" for dtype in ("float16", "bfloat16", "float64")
    }
    for name in ("half", "bfloat16", "double", "plain"):
        assert weights.tensors[name].dtype == np.float32
        np.testing.assert_array_equal(weights.tensors[name], expected[name].astype(np.float32))


def test_safetensors_of_half_precision_become_float32(tmp_path):
    import ml_dtypes

    values = np.linspace(-1, 1, 7).astype(np.float32)
    content = {"h": values.astype(np.float16), "b": values.astype(ml_dtypes.bfloat16)}
    safetensors.numpy.save_file(content, tmp_path / "a.safetensors")
    weights = read_torch_weights(tmp_path / "a.safetensors")
    for key, value in content.items():
        assert weights.tensors[key].dtype == np.float32
        np.testing.assert_array_equal(weights.tensors[key], value.astype(np.float32))
    assert len(weights.notes) == 2


def test_content_decides_not_the_name_of_the_file(tmp_path):
    shutil.copy(FOLDER / "timm_tf.safetensors", tmp_path / "pytorch_model.bin")
    assert "conv_stem.weight" in read_torch_weights(tmp_path / "pytorch_model.bin").tensors


def test_files_that_are_not_there_or_not_whole_are_told(tmp_path):
    with pytest.raises(UserError, match="no such file; expected a"):
        read_torch_weights(tmp_path / "none.pth")
    with pytest.raises(UserError, match="a folder; expected a"):
        read_torch_weights(tmp_path)
    content = (FOLDER / "timm_tf.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-100])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        read_torch_weights(tmp_path / "cut.safetensors")
