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
        ("auto", ("auto", False, 0)),
        ("cpu+remat", ("cpu", True, 0)),
        ("plain+remat12", ("plain", True, 12)),
    ],
)
def test_forms_are_attributes_of_the_network(form, expected):
    forms.check("--lowering", [form])
    found = forms.overrides(form)
    assert (found["lowering"], found["remat"], found["remat_blocks"]) == expected


@pytest.mark.parametrize("form", ["fast", "auto+", "auto+remat1.5", "remat"])
def test_other_forms_are_refused(form):
    with pytest.raises(UserError, match=r"--lowering: .* expected auto, plain, cpu, gpu"):
        forms.check("--lowering", [form])
