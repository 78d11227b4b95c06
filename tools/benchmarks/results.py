"""What was measured, as records: JSON, CSV with the column names of timm's benchmark, tables."""

import csv
import dataclasses
import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import contest, counts
from effv2_jax import atomic
from effv2_jax.errors import UserError

OWN = "effv2_jax"

Record = dict[str, Any]

# What tells the rows of the CSV apart.
_IDENTITY = ("framework", "lowering", "model", "image_size", "batch", "dtype", "cores", "recipe")
_IDENTITY += ("stage",)

# As timm's benchmark.py writes them (huggingface/pytorch-image-models, results/benchmark-*.csv):
# times in ms, parameters and multiply-adds in millions and billions. Behind them, our own.
_COLUMNS = (
    ["model"]
    + [f"infer_{name}" for name in ("samples_per_sec", "step_time", "batch_size", "img_size")]
    + ["infer_gmacs"]
    + [f"train_{name}" for name in ("samples_per_sec", "step_time", "batch_size", "img_size")]
    + ["param_count", "framework", "lowering", "precision", "cores", "device", "recipe"]
    + [f"{mode}_{name}" for mode in ("infer", "train") for name in ("low", "high", "ratio")]
    + ["train_compile_time", "train_device_mib", "train_step_mib", "train_process_mib"]
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What contestants have in common.

    Attributes:
        model: our name.
        image_size: px.
        batch: global.
        dtype: float32 or bfloat16.
        cores: of the host that may be used.
        mode: train or infer.
        recipe: plain, official, or a config.
        stage: of the config; None without one.
    """

    model: str
    image_size: int
    batch: int
    dtype: str
    cores: int
    mode: str
    recipe: str = "plain"
    stage: int | None = None

    def __str__(self) -> str:
        text = (
            f"{self.model}, {self.image_size} px, batch {self.batch}, {self.dtype}, "
            f"{self.cores} core{'s' * (self.cores > 1)}, {self.mode}"
        )
        if self.recipe != "plain":
            text += f", {self.recipe}"
        return text if self.stage is None else f"{text} stage {self.stage + 1}"


def records(case: Case, measured: Sequence[contest.Measured], rates: Mapping) -> list[Record]:
    """Returns one record per contestant, this project's first.

    Args:
        case: what was measured.
        measured: by `contest.compete`.
        rates: of the machine, see workers/rates_worker.py.
    """
    from effv2_jax.models.variants import get_variant

    layers = counts.count_layers(get_variant(case.model), image_size=case.image_size)
    work, least = counts.total(layers, case.mode, dtype=case.dtype, batch=case.batch)
    found = []
    for one in measured:
        median, low, high = contest.rate(one, case.batch)
        record = {
            "kind": "step",
            **dataclasses.asdict(case),
            "framework": one.contestant.name,
            "asked": dict(one.contestant.asked),
            "lowering": one.contestant.task.get("lowering"),
            "peer_model": one.contestant.task.get("peer_model"),
            "images_per_second": median,
            "range": [low, high],
            "rounds": [case.batch / wall for wall, _ in one.rounds],
            "steps_per_round": one.steps,
            "in_turns": one.in_turns,
            "step_ms": 1e3 * case.batch / median,
            "processor_ms_per_image": statistics.median(
                1e3 * cpu / case.batch for _, cpu in one.rounds
            ),
            "cores_busy": statistics.median(cpu / wall for wall, cpu in one.rounds),
            **one.memory,
            "operations_per_image": work,
            "least_bytes_per_image": least,
            "operations_per_second": median * work,
            "bytes_per_second": median * least,
            "share_of_matmul": median * work / rates["matmul_flops"][case.dtype],
            "share_of_copy": median * least / rates["copy_bytes"],
            "matmul_flops": rates["matmul_flops"][case.dtype],
            "copy_bytes": rates["copy_bytes"],
            **one.facts,
            "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            "time": contest.utc(),
        }
        if one is not measured[0]:
            pairs = contest.ratios(measured[0], one)
            record["ratio"] = [statistics.median(pairs), min(pairs), max(pairs)]
            record["ratio_of"] = measured[0].contestant.name
            record["pairs"] = pairs
        found.append(record)
    return found


class Results:
    """All records of a command; the files are complete after every case.

    Args:
        json_path: file, or None.
        csv_path: file, or None.
        resume: whether cases that the JSON file has already need not be measured again.
    """

    def __init__(
        self, json_path: Path | None, csv_path: Path | None, *, resume: bool = False
    ) -> None:
        self._json, self._csv = json_path, csv_path
        self.machines: list[Mapping[str, Any]] = []
        self.records: list[Record] = []
        if resume and json_path is not None and json_path.exists():
            content = read(json_path)
            self.machines, self.records = content["machines"], content["results"]

    def has(
        self, case: Case, contestants: Iterable[contest.Contestant], *, kind: str = "step"
    ) -> bool:
        """Whether a case was measured with all of these, told to compute as they are now."""
        found = [_who(r) for r in self.records if r["kind"] == kind and _is_of(r, case)]
        return all((one.name, dict(one.asked)) in found for one in contestants)

    def candidate(self, case: Case, framework: str, asked: Mapping[str, Any]) -> str | None:
        """The way a contestant chose for this case at another batch size; None: it was not asked.

        Which way is faster is a question of the network, the image size and the cores; trying all
        again at every batch size would take most of the time.
        """
        for record in steps(self.records):
            other = dataclasses.replace(case, batch=record["batch"])
            if _is_of(record, other) and _who(record) == (framework, dict(asked)):
                return record.get("candidate")
        return None

    def add(self, new: Sequence[Record]) -> None:
        """Adds records, instead of older ones of the same, and writes the files."""
        fresh = [_identity(record) for record in new]
        kept = [record for record in self.records if _identity(record) not in fresh]
        self.records = [*kept, *new]
        self.write()

    def write(self) -> None:
        """Writes the files that were asked for."""
        if self._json is not None:
            content = {"machines": self.machines, "results": self.records}
            atomic.write_json(self._json, content)
        if self._csv is not None:
            with atomic.replacing(self._csv) as temporary, temporary.open("w", newline="") as file:
                writer = csv.DictWriter(file, _COLUMNS, restval="")
                writer.writeheader()
                writer.writerows(_rows(steps(self.records)))


def read(path: str | Path) -> dict[str, Any]:
    """Reads a JSON file of results.

    Raises:
        UserError: it is none.
    """
    try:
        content = json.loads(Path(path).read_text())
        # Files of an earlier form of the tool did not say what kind of result each is.
        if isinstance(content["machines"], list) and all("kind" in r for r in content["results"]):
            return content
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path}: no results; expected a JSON file that tools/benchmark.py wrote")


def steps(found: Iterable[Record]) -> list[Record]:
    """Those of training and inference steps, among records of all kinds."""
    return [record for record in found if record["kind"] == "step"]


def _is_of(record: Record, case: Case) -> bool:
    return all(record[key] == value for key, value in dataclasses.asdict(case).items())


def _identity(record: Record) -> tuple:
    """What tells a record from all others."""
    keys = ("kind", "part", "pass", *(field.name for field in dataclasses.fields(Case)))
    return (*_who(record), *(record.get(key) for key in keys))


def _who(record: Record) -> tuple[str, dict[str, Any]]:
    """What tells a contestant of a case from the others."""
    return record["framework"], record["asked"]


def _rows(found: Sequence[Record]) -> list[Record]:
    """Rows of the CSV: inference and training of the same thing side by side."""
    rows: dict[tuple, Record] = {}
    for record in found:
        mode = record["mode"]
        row = rows.setdefault(
            tuple(record[key] for key in _IDENTITY),
            {
                "model": record["peer_model"] or record["model"],
                "param_count": round(record["param_count"] / 1e6, 2),
                "framework": record["framework"],
                "lowering": record["lowering"],
                "precision": record["dtype"],
                "cores": record["cores"],
                "device": record["device"],
                "recipe": record["recipe"],
            },
        )
        row |= {
            f"{mode}_samples_per_sec": round(record["images_per_second"], 2),
            f"{mode}_step_time": round(record["step_ms"], 3),
            f"{mode}_batch_size": record["batch"],
            f"{mode}_img_size": record["image_size"],
            f"{mode}_low": round(record["range"][0], 2),
            f"{mode}_high": round(record["range"][1], 2),
            f"{mode}_ratio": round(record["ratio"][0], 3) if "ratio" in record else "",
        }
        if mode == "infer":
            row["infer_gmacs"] = round(record["operations_per_image"] / 2e9, 3)
        else:
            row["train_compile_time"] = round(record["compile_seconds"], 1)
            row["train_device_mib"] = _mebibytes(record["device_bytes"])
            row["train_step_mib"] = _mebibytes(record.get("step_bytes"))
            row["train_process_mib"] = _mebibytes(record["resident_bytes"])
    return list(rows.values())


def _mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.0f}"


def describe_machine(*times: Mapping[str, Any]) -> str:
    """Two lines: what computes, and how fast it multiplied and copied at one or several times."""
    machine = times[0]
    loads = [found["load"] for found in times if found["load"] is not None]
    matmul: dict[str, list[float]] = {}
    for found in times:
        for dtype, rate in found["matmul_flops"].items():
            matmul.setdefault(dtype, []).append(rate / 1e9)
    rates = ", ".join(f"{dtype} {_span(values, ',.0f')}" for dtype, values in matmul.items())
    copies = _span([found["copy_bytes"] / 1e9 for found in times], ",.1f")
    return (
        f"{machine['devices']} x {machine['device']} ({machine['processor']}), "
        f"{machine['cores']} of its cores, load {_span(loads, '.1f') if loads else 'unknown'}; "
        f"jax {machine['jax']}, jaxlib {machine['jaxlib']}; {machine['tuning']}\n"
        f"measured: matrix products {rates} GFLOP/s, copies {copies} GB/s"
    )


def _span(values: Sequence[float], layout: str) -> str:
    ends = dict.fromkeys(format(end, layout) for end in (min(values), max(values)))
    return " to ".join(ends)


def table(case: Case, found: Sequence[Record]) -> str:
    """The records of a case for a reader, with the ratios below."""
    width = max(len(_label(record, found)) for record in found) + 2
    lines = [
        str(case),
        f"{'':<{width}}{'images/s':>9} {'(range)':<19}{'ms/step':>9}{'cpu ms/img':>11}"
        f"{'matmul':>8}{'copy':>6}{'program':>9}{'device':>8}{'step':>8}{'process':>9}{'compile':>9}",
    ]
    for r in found:
        spread = "({:,.1f} - {:,.1f})".format(*r["range"])
        keys = ("program_bytes", "device_bytes", "step_bytes", "resident_bytes")
        program, device, step, process = (_mebibytes(r.get(key)) or "-" for key in keys)
        lines.append(
            f"{_label(r, found):<{width}}{r['images_per_second']:>9,.1f} {spread:<19}"
            f"{r['step_ms']:>9,.1f}{r['processor_ms_per_image']:>11.2f}{r['share_of_matmul']:>8.0%}"
            f"{r['share_of_copy']:>6.0%}{program:>9}{device:>8}{step:>8}{process:>9}"
            f"{r['compile_seconds']:>7.1f} s"
        )
    first = _label(found[0], found)
    for r in found[1:]:
        note = "" if r["in_turns"] else "; NOT in turns: memory does not suffice for all at once"
        lines.append(
            "{} / {} = {:.2f} ({:.2f} - {:.2f}), {} pairs{}".format(
                first, _label(r, found), *r["ratio"], len(r["pairs"]), note
            )
        )
    return "\n".join(lines)


def settings(record: Mapping[str, Any]) -> str:
    """One line: with what a contestant ran, and what else was tried."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    text = f"{record['framework']}: {versions}; {record['settings']}"
    if len(record.get("tried", ())) > 1:
        tried = "; ".join(f"{name} {told}" for name, told in record["tried"].items())
        text += f" (tried: {tried})"
    return text


def _label(record: Mapping[str, Any], among: Sequence[Mapping[str, Any]]) -> str:
    """The contestant's name, with the lowering where several take part."""
    lowerings = {other["lowering"] for other in among if other["framework"] == record["framework"]}
    if len(lowerings) > 1:
        return f"{record['framework']} {record['lowering']}"
    return record["framework"]
