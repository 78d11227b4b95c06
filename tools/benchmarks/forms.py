"""How a network is computed, as flags name it: "auto", "plain+remat", "auto+remat-mbconv".

A lowering, and behind it whether the backward pass computes blocks again: all, or MBConv alone
(`model.remat`, `model.remat_fused`).
"""

import re
from collections.abc import Sequence
from typing import Any

from effv2_jax.config import CHOICES
from effv2_jax.errors import UserError

LOWERINGS = CHOICES["model.lowering"]
TEXT = f"{', '.join(LOWERINGS)}, +remat behind it: blocks computed again, +remat-mbconv: MBConv"

_FORM = re.compile(rf"({'|'.join(LOWERINGS)})(?:(\+remat)(-mbconv)?)?")


def check(flag: str, values: Sequence[str]) -> None:
    """Refuses what is no form."""
    for value in values:
        if not _FORM.fullmatch(value):
            raise UserError(f"{flag}: {value!r}; expected {TEXT}")


def overrides(form: str) -> dict[str, Any]:
    """Returns the attributes of `EfficientNet` for a form."""
    lowering, remat, mbconv = _FORM.fullmatch(form).groups()
    return {"lowering": lowering, "remat": bool(remat), "remat_fused": not mbconv}
