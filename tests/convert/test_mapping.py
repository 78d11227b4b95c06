import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effv2_jax import UserError, create_model
from effv2_jax.convert import mapping, names_tf
from effv2_jax.convert.mapping import TRANSFORMS, TensorName
from effv2_jax.models.initial_variables import init_variables


@pytest.fixture(scope="module")
def model():
    return create_model("testing", num_classes=3)


@pytest.fixture(scope="module")
def names(model):
    return names_tf.tensor_names(model.block_specs, num_classes=3)


@pytest.fixture(scope="module")
def variables(model):
    return init_variables(model, 0)


@pytest.mark.parametrize(
    ("transform", "theirs", "ours"),
    [
        ("same", (3, 3, 4, 5), (3, 3, 4, 5)),
        ("depthwise_tf", (3, 5, 4, 1), (3, 5, 1, 4)),
        ("conv_torch", (5, 4, 3, 7), (3, 7, 4, 5)),
        ("depthwise_torch", (4, 1, 3, 5), (3, 5, 1, 4)),
        ("linear_torch", (10, 4), (4, 10)),
    ],
)
def test_transforms_move_the_axes_and_come_back(transform, theirs, ours):
    to_ours, to_theirs = TRANSFORMS[transform]
    tensor = np.random.default_rng(0).normal(size=theirs)
    assert to_ours(tensor).shape == ours
    np.testing.assert_array_equal(to_theirs(to_ours(tensor)), tensor)


def test_torch_kernels_keep_which_tap_belongs_to_which_channel():
    kernel = np.random.default_rng(0).normal(size=(5, 4, 3, 7))  # [O, I, h, w]
    assert TRANSFORMS["conv_torch"][0](kernel)[2, 6, 1, 4] == kernel[4, 1, 2, 6]
    kernel = np.random.default_rng(0).normal(size=(4, 1, 3, 5))  # [C, 1, h, w]
    assert TRANSFORMS["depthwise_torch"][0](kernel)[2, 3, 0, 1] == kernel[1, 0, 2, 3]


def test_there_and_back_is_exact(model, names, variables):
    tensors = mapping.from_variables(variables, names)
    assert all(tensor.flags.c_contiguous for tensor in tensors.values())
    back = mapping.to_variables(tensors, names, model, where="here")
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, back, variables)


class Lazy(dict):
    """Reads a tensor when it is asked for, and counts."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.reads = []

    def __getitem__(self, key):
        self.reads.append(key)
        return super().__getitem__(key)


def test_every_tensor_is_read_once(model, names, variables):
    tensors = Lazy(mapping.from_variables(variables, names))
    mapping.to_variables(tensors, names, model, where="here")
    assert sorted(tensors.reads) == sorted(name.theirs for name in names)


def test_everything_wrong_is_told_at_once(model, names, variables):
    tensors = mapping.from_variables(variables, names)
    del tensors["stem/conv2d/kernel"], tensors["blocks_3/se/conv2d/bias"]
    tensors["blocks_9/conv2d/kernel"] = np.zeros(1, np.float32)
    tensors["head/dense/bias"] = np.zeros(4, np.float32)
    tensors["head/dense/kernel"] = tensors["head/dense/kernel"].astype(np.float16)
    depthwise = tensors["blocks_3/depthwise_conv2d/depthwise_kernel"]
    tensors["blocks_3/depthwise_conv2d/depthwise_kernel"] = depthwise.transpose(0, 1, 3, 2)
    beta = tensors["stem/tpu_batch_normalization/beta"].copy()
    beta[2:] = np.nan
    tensors["stem/tpu_batch_normalization/beta"] = beta
    with pytest.raises(UserError) as error:
        mapping.to_variables(tensors, names, model, where="some.ckpt")
    told = str(error.value)
    assert told.startswith("some.ckpt: not the weights of testing: ")
    assert "\n" not in told
    size = beta.size
    for part in (
        "2 missing: stem/conv2d/kernel, blocks_3/se/conv2d/bias",
        "1 unexpected: blocks_9/conv2d/kernel",
        "head/dense/bias is float32[4], expected float32[3]",
        "head/dense/kernel is float16[32, 3], expected float32[32, 3]",
        "depthwise_kernel is float32[3, 3, 1, 64], expected float32[3, 3, 64, 1]",
        f"1 not finite: stem/tpu_batch_normalization/beta ({size - 2} of {size} values)",
    ):
        assert part in told


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_no_single_fault_passes(data, model, names, variables):
    tensors = mapping.from_variables(variables, names)
    key = data.draw(st.sampled_from(sorted(tensors)))
    fault = data.draw(st.sampled_from(["missing", "renamed", "shape", "dtype", "nan", "inf"]))
    tensor = tensors.pop(key)
    if fault == "renamed":
        tensors[f"{key}x"] = tensor
    elif fault == "shape":
        tensors[key] = tensor[..., None]
    elif fault == "dtype":
        tensors[key] = tensor.astype(np.float64)
    elif fault in ("nan", "inf"):
        tensor = tensor.copy()
        tensor.flat[data.draw(st.integers(0, tensor.size - 1))] = float(fault)
        tensors[key] = tensor
    with pytest.raises(UserError, match=key):
        mapping.to_variables(tensors, names, model, where="here")


def test_a_table_that_is_not_one_to_one_is_refused(model, names, variables):
    tensors = mapping.from_variables(variables, names)
    twice = TensorName(names[0].path, names[1].theirs)
    for wrong in (names[1:], (twice, *names[1:])):
        with pytest.raises(ValueError, match="one to one"):
            mapping.to_variables(tensors, wrong, model, where="here")
