import jax
import numpy as np
import pytest

from effv2_jax.convert import mapping, names_tf
from effv2_jax.models.block_spec import expand_blocks
from effv2_jax.models.network import create_model
from effv2_jax.models.variants import get_variant, list_models
from tests import reference


def _names(name="testing", **options):
    variant = get_variant(name)
    blocks = expand_blocks(variant.blocks, width=variant.width, depth=variant.depth)
    return names_tf.tensor_names(blocks, **options)


def _values(names):
    return {n.theirs: np.full((3, 3, 4, 1), float(i)) for i, n in enumerate(names)}


@pytest.mark.parametrize("name", list_models())
def test_names_and_their_order_are_the_official_ones(name):
    names = _names(name)
    assert [n.theirs for n in names] == [row[0] for row in reference.model_facts(name)["variables"]]
    assert len({n.path for n in names}) == len(names)


def test_names_of_the_training_reference_are_the_official_ones():
    facts = reference.load_json("train/train.json")
    tree = reference.train_variables("a_rmsprop")
    assert tree["params"]["classifier"]["kernel"].shape == (32, facts["classes"])
    # This network is "testing" with one block less and another expansion; its tree loads.
    assert tree["params"]["blocks_1"]["expand_conv"]["kernel"].shape == (3, 3, 8, 16)


def test_paths_are_those_of_the_network():
    model = create_model("testing", 10)
    shapes = jax.eval_shape(
        model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    )
    paths = {
        "/".join(entry.key for entry in path)
        for path, _ in jax.tree_util.tree_leaves_with_path(shapes)
    }
    assert paths == {n.path for n in names_tf.tensor_names(model.block_specs, num_classes=10)}
    without = {n.path for n in names_tf.tensor_names(model.block_specs, num_classes=0)}
    assert paths - without == {"params/classifier/kernel", "params/classifier/bias"}


def test_there_and_back_changes_nothing_and_swaps_depthwise_axes():
    names = _names()
    values = _values(names)
    tree = mapping.arrange(values, names)
    assert tree["params"]["blocks_3"]["depthwise_conv"]["kernel"].shape == (3, 3, 1, 4)
    assert tree["params"]["blocks_3"]["expand_conv"]["kernel"].shape == (3, 3, 4, 1)
    back = mapping.from_variables(tree, names)
    assert list(back) == [n.theirs for n in names]
    for key, value in values.items():
        np.testing.assert_array_equal(back[key], value)
