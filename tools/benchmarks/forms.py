"""How a network is computed, as flags name it: "auto", "plain+remat", "auto+remat-mbconv".

A lowering, and behind it what the backward pass computes again: all blocks, or MBConv alone, or
norms and activations alone (`model.remat`, `model.remat_fused`, `model.remat_norms`).
"""

import re
from collections.abc import Sequence
from typing import Any

from effv2_jax.config import CHOICES
from effv2_jax.errors import UserError

LOWERINGS = CHOICES["model.lowering"]
TEXT = (
    f"{', '.join(LOWERINGS)}, +remat behind it: blocks computed again, +remat-mbconv: MBConv, "
    "+remat-norms: norms"
)

_FORM = re.compile(rf"({'|'.join(LOWERINGS)})(\+remat|\+remat-mbconv|\+remat-norms)?")


def check(flag: str, values: Sequence[str]) -> None:
    """Refuses what is no form."""
    for value in values:
        if not _FORM.fullmatch(value):
            raise UserError(f"{flag}: {value!r}; expected {TEXT}")


def overrides(form: str) -> dict[str, Any]:
    """Returns the attributes of `EfficientNet` for a form."""
    lowering, again = _FORM.fullmatch(form).groups()
    return {
        "lowering": lowering,
        "remat": again in ("+remat", "+remat-mbconv"),
        "remat_fused": again != "+remat-mbconv",
        "remat_norms": again == "+remat-norms",
    }
