import math

import jax
import jax.numpy as jnp
import pytest

from effv2_jax.errors import UserError
from effv2_jax.models import summary
from effv2_jax.models.block_spec import round_channels
from effv2_jax.models.network import create_model
from effv2_jax.models.variants import get_variant, list_models
from tests import reference


def _official_multiply_adds(name):
    """The number in models.json, with its stem counted with the stem's channels.

    models.json contradicts itself there: it was counted after the official code had built the
    network, which overwrites the first row's input channels by its output channels when that row
    has several blocks (effnetv2_model.py, _build), and scales them again. Its own `variables` and
    `endpoints` have the stem's true shape.
    """
    facts, variant = reference.model_facts(name), get_variant(name)
    first, stem = variant.blocks[0], facts["stem_filters"]
    counted = stem
    if math.ceil(first.repeats * variant.depth) > 1:
        counted = round_channels(round_channels(first.channels, variant.width), variant.width)
    _, height, width, channels = facts["endpoints_batch1_eval_size"]["stem"]
    assert channels == stem
    return facts["multiply_adds_at_eval_size"] + 27 * (stem - counted) * height * width


@pytest.mark.parametrize("name", list_models())
def test_totals_equal_the_official_numbers_exactly(name):
    facts, variant = reference.model_facts(name), get_variant(name)
    rows = summary.summarize(variant, image_size=variant.eval_size)
    blocks, parameters, statistics, multiply_adds = summary.totals(rows)
    assert blocks == len(facts["blocks"])
    assert parameters == facts["params_trainable"]
    assert parameters + statistics == facts["params_total"]
    assert multiply_adds == _official_multiply_adds(name)


@pytest.mark.parametrize("name", list_models())
def test_shapes_equal_the_official_endpoints(name):
    facts, variant = reference.model_facts(name), get_variant(name)
    rows = summary.summarize(variant, image_size=variant.eval_size)
    ends = facts["endpoints_batch1_eval_size"]
    assert [1, *rows[0].output] == ends["stem"]
    assert [1, *rows[-3].output] == ends["features"]
    assert [1, *rows[-2].output] == ends["head_1x1"]


def _convolution_multiply_adds(jaxpr):
    """Multiply-adds of the convolutions and matrix products of a traced function."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            _, kernel = (v.aval.shape for v in eqn.invars)
            total += math.prod(kernel[:3]) * math.prod(eqn.outvars[0].aval.shape)
        elif eqn.primitive.name == "dot_general":
            total += math.prod(eqn.invars[0].aval.shape) * eqn.outvars[0].aval.shape[-1]
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += _convolution_multiply_adds(inner)
    return total


@pytest.mark.parametrize(
    ("name", "size", "overrides"),
    [
        ("testing", 33, {}),
        ("testing", 32, {"blocks": ("r2_k5_s2_e1_i8_o8_se0.5", "r1_k3_s1_e1_i8_o16_c1_se0.25")}),
        ("efficientnetv2-b1", 240, {}),
        ("efficientnet-b4", 95, {"width": 0.5, "depth": 0.6}),
    ],
)
def test_summary_equals_the_program_that_runs(name, size, overrides):
    model = create_model(name, 10, lowering="plain", **overrides)
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    traced = jax.make_jaxpr(model.apply)(variables, images)
    rows = summary.summarize(model, image_size=size, num_classes=10)
    _, parameters, statistics, multiply_adds = summary.totals(rows)
    assert multiply_adds == _convolution_multiply_adds(traced.jaxpr)
    assert parameters == sum(math.prod(p.shape) for p in jax.tree.leaves(variables["params"]))
    assert statistics == sum(math.prod(p.shape) for p in jax.tree.leaves(variables["batch_stats"]))


def test_command_prints_the_stages_of_a_network(capsys):
    assert summary.main(["efficientnetv2-s", "--image-size", "300"]) == 0
    out = capsys.readouterr().out
    assert "efficientnetv2-s at 300 x 300 pixels" in out
    assert "21,458,488 parameters, 21,612,360 with the moving statistics" in out
    assert "FusedMBConv4, 3x3, stride 2" in out
    assert "10 x 10 x 1280" in out


def test_command_compares_all_networks(capsys):
    assert summary.main(["--all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(list_models())
    assert lines[2 + list_models().index("efficientnetv2-b0")].endswith("0.718")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["efficientnetv2-sm"], "did you mean 'efficientnetv2-s'"),
        (["testing", "--image-size", "0"], "at least 1 pixel"),
        ([], "no model given"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments, message, capsys):
    assert summary.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_summarize_refuses_an_image_without_pixels():
    with pytest.raises(UserError, match="image-size is -3"):
        summary.summarize(get_variant("testing"), image_size=-3)
