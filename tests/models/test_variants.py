import dataclasses
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effv2_jax.errors import UserError
from effv2_jax.models.block_spec import (
    BlockSpec,
    expand_blocks,
    format_block,
    parse_block,
    parse_blocks,
    round_channels,
    round_repeats,
)
from effv2_jax.models.network import create_model
from effv2_jax.models.summary import summarize, totals
from effv2_jax.models.variants import get_variant, list_models
from tests import reference


def test_all_official_networks_are_listed_and_no_other():
    assert set(list_models()) == set(reference.load_json("models.json"))


@pytest.mark.parametrize("name", list_models())
def test_recipe_values_equal_the_official_ones(name):
    facts, variant = reference.model_facts(name), get_variant(name)
    found = {
        "eval_size": variant.eval_size,
        "train_size": variant.train_size,
        "train_size_config": variant.train_size_setting,
        "width": variant.width,
        "depth": variant.depth,
        "dropout": variant.dropout_rate,
        "survival_prob": variant.survival_prob,
        "augname": variant.augname,
        "randaug_magnitude": variant.randaugment_magnitude,
        "randaug_layers": variant.randaugment_layers,
        "mixup_alpha": variant.mixup_alpha,
        "cutmix_alpha": variant.cutmix_alpha,
        "stages": variant.stages,
        "sched": variant.sched or None,
    }
    assert found == {key: facts[key] for key in found}


@pytest.mark.parametrize("name", list_models())
def test_every_block_equals_the_official_one(name):
    variant = get_variant(name)
    blocks = expand_blocks(variant.blocks, width=variant.width, depth=variant.depth)
    found = [
        {
            "kind": "fused" if spec.fused else "mbconv",
            "kernel": spec.kernel,
            "stride": spec.stride,
            "expand": spec.expand,
            "cin": spec.in_channels,
            "cout": spec.channels,
            "se": spec.se_channels,
            "residual": spec.has_residual,
        }
        for spec in blocks
    ]
    expected = reference.model_facts(name)["blocks"]
    assert found == [{key: row[key] for key in found[0]} for row in expected]


def test_progressive_ranges_of_the_paper_are_those_of_its_table_6():
    rows = {name: get_variant(f"efficientnetv2-{name}").paper for name in "sml"}
    assert rows["s"].image_size == (128, 300)
    assert rows["m"].image_size == rows["l"].image_size == (128, 380)
    assert [rows[n].magnitude for n in "sml"] == [(5, 15), (5, 20), (5, 25)]
    assert [rows[n].mixup_alpha for n in "sml"] == [(0, 0), (0, 0.2), (0, 0.5)]
    assert [rows[n].dropout_rate for n in "sml"] == [(0.1, 0.3), (0.1, 0.4), (0.1, 0.5)]


def test_v2_b_variants_use_v1_preprocessing_and_autoaugment():
    assert get_variant("efficientnetv2-b2").preprocessing == "v1"
    assert get_variant("efficientnetv2-b2").augment == "autoaugment"
    assert get_variant("efficientnetv2-s").preprocessing == "v2"
    assert get_variant("efficientnetv2-s").augment == "randaugment"


def test_families_are_listed_apart_from_the_official_networks():
    timm = list_models("timm")
    assert timm == ("efficientnetv2-rw-t", "efficientnetv2-rw-s", "efficientnetv2-rw-m")
    assert not set(timm) & set(list_models())
    assert (*list_models("v2"), *list_models("v1")) == list_models()


@pytest.mark.parametrize(
    ("name", "parameters"),  # of timm 1.0.31
    [
        ("efficientnetv2-rw-t", 13_649_388),
        ("efficientnetv2-rw-s", 23_941_296),
        ("efficientnetv2-rw-m", 53_236_442),
    ],
)
def test_networks_of_timm_have_its_parameters_padding_and_epsilon(name, parameters):
    rows = summarize(get_variant(name), image_size=224)
    assert totals(rows)[1] == parameters
    model = create_model(name)
    assert (model.padding, model.bn_epsilon) == ("SYMMETRIC", 1e-5)
    assert create_model("efficientnetv2-s").padding == "SAME"


def test_unknown_model_names_the_nearest_one():
    with pytest.raises(UserError, match="did you mean 'efficientnetv2-b3'"):
        get_variant("efficientnetv2_b3")


def test_testing_variant_has_one_block_of_each_kind():
    specs = get_variant("testing").blocks
    kinds = {(spec.fused, spec.expand > 1, spec.se > 0) for spec in specs}
    assert kinds == {(True, False, False), (True, True, False), (False, True, True)}
    assert {spec.kernel for spec in specs} == {3, 5}


_any_specs = st.builds(
    BlockSpec,
    fused=st.booleans(),
    kernel=st.sampled_from([3, 5, 7]),
    stride=st.sampled_from([1, 2]),
    expand=st.integers(1, 8),
    in_channels=st.integers(1, 999),
    channels=st.integers(1, 999),
    repeats=st.integers(1, 40),
    se=st.floats(0, 1),
)
_specs = _any_specs | _any_specs.map(
    lambda spec: dataclasses.replace(spec, fused=True, expand=1, two_convs=True)
)


@given(_specs)
def test_block_notation_reads_back_what_it_wrote(spec):
    assert parse_block(format_block(spec)) == spec
    assert parse_blocks([spec, format_block(spec)]) == (spec, spec)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("r2_k3_s1_e1_i24_o24_c2", "c2"),
        ("r2_k3_s1_e1_i24", "no o"),
        ("r2_k3_s1_e1_i24_o24_x9", "x9"),
        ("r2_k3.5_s1_e1_i24_o24", "k3.5"),
        ("r0_k3_s1_e1_i24_o24", "repeats"),
        ("r1_k3_s1_e1_i24_o24_se1.5", "se is 1.5"),
        ("r1_k3_s1_e1_i24_o24_c1_p2", "p2 is unknown"),
        ("r1_k3_s1_e4_i24_o24_c1_p1", "two_convs is for FusedMBConv"),
        ("r1_k3_s1_e1_i24_o24_p1", "two_convs is for FusedMBConv"),
        ("", "''"),
    ],
)
def test_bad_block_strings_are_refused_with_the_part_at_fault(text, part):
    with pytest.raises(UserError, match=part.replace(".", r"\.")):
        parse_block(text)


def test_blocks_that_do_not_fit_each_other_are_refused():
    rows = parse_blocks(["r1_k3_s1_e1_i8_o16_c1", "r1_k3_s2_e4_i24_o32_c1"])
    with pytest.raises(UserError, match="gives 16 channels"):
        expand_blocks(rows, width=1.0, depth=1.0)
    with pytest.raises(UserError, match="empty"):
        expand_blocks((), width=1.0, depth=1.0)


@given(st.integers(1, 2000), st.floats(0.1, 6))
def test_rounded_channels_are_the_nearest_multiple_of_eight(channels, width):
    rounded = round_channels(channels, width)
    assert rounded % 8 == 0
    assert rounded >= 8
    assert rounded == 8 or abs(rounded - channels * width) <= 4


def test_repeats_round_up():
    # As the official code, in double precision: 1.1 * 10 is a little above 11.
    assert [round_repeats(r, d) for r, d in ((1, 1.1), (3, 1.0), (5, 2.2), (10, 1.1))] == [
        2, 3, 11, 11,
    ]  # fmt: skip


def test_table_is_read_without_jax():
    code = "import sys, effv2_jax.models.variants; print({'jax', 'flax'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
