"""What a run has written down about itself: its metrics.jsonl."""

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effv2_jax.errors import UserError

Points = list[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Run:
    """What one metrics.jsonl says.

    Attributes:
        name: of the workdir.
        records: its lines, in the order of the steps.
    """

    name: str
    records: tuple[Mapping[str, Any], ...]

    def points(self, split: str, key: str) -> Points:
        """The (epoch, value) of a key, where it was measured and finite."""
        return [
            (record["epoch"], record[key])
            for record in self.records
            if record.get("split") == split and _is_number(record.get(key))
        ]

    def stages(self) -> list[tuple[float, float, int]]:
        """(first epoch, last epoch, image size) of each stage, without gaps between them."""
        spans, start = [], 0.0
        for _, group in itertools.groupby(self.records, key=lambda r: r.get("stage", 0)):
            members = list(group)
            end = members[-1]["epoch"]
            spans.append((start, end, members[-1].get("image_size", 0)))
            start = end
        return spans


def read_run(workdir: str | Path) -> Run:
    """Reads a workdir's metrics.jsonl; lines cut off when the process was killed are left out.

    Raises:
        UserError: there is no metrics.jsonl, or nothing was measured yet.
    """
    path = Path(workdir) / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected the workdir of a run")
    records = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and all(_is_number(record.get(k)) for k in ("step", "epoch")):
            records.append(record)
    if not records:
        raise UserError(f"{path}: nothing measured yet; wait for the first logged step")
    return Run(path.absolute().parent.name, tuple(sorted(records, key=lambda r: r["step"])))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
