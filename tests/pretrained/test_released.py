"""The table of released checkpoints."""

import subprocess
import sys
from pathlib import Path

import pytest

from effv2_jax.errors import UserError
from effv2_jax.models.variants import RELEASED_V1_B3, get_variant, list_models
from effv2_jax.pretrained import released
from effv2_jax.pretrained.released import RELEASED

ROOT = Path(__file__).parents[2]


def _row(name: str) -> released.Released:
    return released.parse(name)


def test_every_row_is_of_a_known_network_and_has_its_own_name_and_address():
    assert len(RELEASED) == 58
    assert {row.model for row in RELEASED} <= set(list_models())
    for key in ("name", "url"):
        assert len({getattr(row, key) for row in RELEASED}) == len(RELEASED)


def test_v2_has_three_weights_each_but_xl():
    networks = [f"efficientnetv2-{size}" for size in ("b0", "b1", "b2", "b3", "s", "m", "l", "xl")]
    for model in networks:
        weights = [row.weights for row in RELEASED if row.model == model]
        expected = ["imagenet1k", "imagenet21k", "imagenet21k-ft1k"]
        assert weights == (expected[1:] if model.endswith("xl") else expected)


@pytest.mark.parametrize(
    ("name", "path", "classes", "size", "kind", "top1"),
    [
        ("efficientnetv2-s:imagenet1k", "v2/efficientnetv2-s.tgz", 1000, 384, "v2", 83.9),
        ("efficientnetv2-b0:imagenet1k", "v2/efficientnetv2-b0.tgz", 1000, 224, "v1", 78.7),
        ("efficientnetv2-l:imagenet21k", "v2/efficientnetv2-l-21k.tgz", 21843, 224, "v2", None),
        ("efficientnetv2-xl:imagenet21k-ft1k", "v2/efficientnetv2-xl-21k-ft1k.tgz", 1000, 512,
         "finetune", 87.2),
        ("efficientnet-b5:baseline", "ckpts/efficientnet-b5.tar.gz", 1000, 456, "v1", 83.1),
        ("efficientnet-b7:autoaugment", "ckptsaug/efficientnet-b7.tar.gz", 1000, 600, "v1", 84.3),
        ("efficientnet-b5:randaugment", "randaug/efficientnet-b5-randaug.tar.gz", 1000, 456, "v1",
         83.7),
        ("efficientnet-b8:advprop", "advprop/efficientnet-b8.tar.gz", 1000, 672, "advprop", 85.5),
        ("efficientnet-b7:noisystudent", "noisystudent/noisy_student_efficientnet-b7.tar.gz", 1000,
         600, "v1", 86.9),
        ("efficientnet-l2:noisystudent-475",
         "noisystudent/noisy_student_efficientnet-l2_475.tar.gz", 1000, 475, "v1", 88.2),
    ],
)  # fmt: skip
def test_rows_as_published(name, path, classes, size, kind, top1):
    row = _row(name)
    assert row.url == f"https://storage.googleapis.com/cloud-tpu-checkpoints/efficientnet/{path}"
    assert (row.num_classes, row.image_size, row.preprocessing) == (classes, size, kind)
    assert row.top1 == top1


def test_all_of_advprop_and_nothing_else_has_its_normalisation():
    for row in RELEASED:
        assert (row.preprocessing == "advprop") == (row.weights == "advprop"), row.name


def test_fine_tuned_weights_are_evaluated_at_the_size_of_the_network():
    for row in RELEASED:
        if row.weights == "imagenet21k-ft1k":
            assert (row.preprocessing, row.image_size) == (
                "finetune", get_variant(row.model).eval_size,
            )  # fmt: skip


def test_v1_b3_is_the_network_that_was_released():
    rows = {row.name: row.blocks for row in RELEASED}
    assert (
        rows["efficientnet-b3:advprop"] == RELEASED_V1_B3 != get_variant("efficientnet-b3").blocks
    )
    assert rows["efficientnet-b4:advprop"] == get_variant("efficientnet-b4").blocks
    assert rows["efficientnetv2-b3:imagenet1k"] == get_variant("efficientnetv2-b3").blocks


def test_outputs_for_21k_are_each_for_itself():
    for row in RELEASED:
        assert (row.loss == "sigmoid") == (row.num_classes == 21843), row.name


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("efficientnetv2-s:imagenet", "were released: imagenet1k, imagenet21k, imagenet21k-ft1k"),
        ("efficientnetv2-xl:imagenet1k", "were released: imagenet21k, imagenet21k-ft1k"),
        ("efficientnetv2:imagenet1k", "did you mean 'efficientnetv2-"),
        ("efficientnet-b6:baseline", "were released: autoaugment, advprop, noisystudent"),
    ],
)
def test_unknown_name_is_answered_with_those_there_are(spec, says):
    with pytest.raises(UserError) as error:
        released.parse(spec)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("efficientnetv2-s:imagenet1k", True),
        ("efficientnetv2-s:anything", True),
        ("efficientnetv2-s", False),
        ("runs/mine/final.safetensors", False),
        ("C:weights.safetensors", False),
        (r"C:\weights\final", False),
        ("http://site/x", False),
    ],
)
def test_names_are_told_from_files(spec, names):
    assert released.names_weights(spec) == names


def test_the_table_and_the_list_load_no_jax():
    code = (
        "import sys; from effv2_jax.pretrained.__main__ import table; table(); "
        "assert not {'jax', 'flax', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_misspelled_weights_are_told_with_the_nearest():
    for spec, says in (
        (
            "efficientnetv2-s:imagenet21kft1k",
            "did you mean 'imagenet21k-ft1k'? of efficientnetv2-s",
        ),
        ("efficientnetv2-s:best", "no such weights; of efficientnetv2-s were released: imagenet1k"),
        ("efficientnetv2-s", "efficientnetv2-s: say which weights, NAME:WEIGHTS; of"),
    ):
        with pytest.raises(UserError) as error:
            released.parse(spec)
        assert says in str(error.value)
