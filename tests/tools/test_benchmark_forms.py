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
        ("auto", ("auto", False, True, False)),
        ("cpu+remat", ("cpu", True, True, False)),
        ("plain+remat-mbconv", ("plain", True, False, False)),
        ("gpu+remat-norms", ("gpu", False, True, True)),
    ],
)
def test_forms_are_attributes_of_the_network(form, expected):
    forms.check("--lowering", [form])
    found = forms.overrides(form)
    names = ("lowering", "remat", "remat_fused", "remat_norms")
    assert tuple(found[name] for name in names) == expected


@pytest.mark.parametrize("form", ["fast", "auto+", "auto-mbconv", "auto+remat-", "remat"])
def test_other_forms_are_refused(form):
    with pytest.raises(UserError, match=r"--lowering: .* expected auto, plain, cpu, gpu"):
        forms.check("--lowering", [form])
