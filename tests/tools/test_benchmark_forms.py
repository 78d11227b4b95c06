"""Forms of a network, as the benchmark's flags name them."""

import sys
from pathlib import Path

import pytest

from effv2_jax.errors import UserError

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from benchmarks import forms  # noqa: E402


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("auto", ("auto", False, True)),
        ("cpu+remat", ("cpu", True, True)),
        ("plain+remat-mbconv", ("plain", True, False)),
    ],
)
def test_forms_are_attributes_of_the_network(form, expected):
    forms.check("--lowering", [form])
    found = forms.overrides(form)
    assert (found["lowering"], found["remat"], found["remat_fused"]) == expected


@pytest.mark.parametrize("form", ["fast", "auto+", "auto-mbconv", "remat"])
def test_other_forms_are_refused(form):
    with pytest.raises(UserError, match=r"--lowering: .* expected auto, plain, cpu, gpu"):
        forms.check("--lowering", [form])
