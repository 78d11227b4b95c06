"""The plan of a run, as its first lines print it and as plan.json keeps it."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from effv2_jax.data.policy import Policy
from effv2_jax.training.compile import Program, scaled_memory
from effv2_jax.training.progressive import Stage


@dataclasses.dataclass(frozen=True)
class StageMemory:
    """Memory of a stage's train step on each device.

    Attributes:
        bytes: None where the backend does not say.
        estimated: scaled from another stage's compiled program instead of measured on its own.
    """

    bytes: int | None
    estimated: bool


def evaluation_steps(
    stages: Sequence[Stage], *, num_examples: int, every_epochs: float
) -> frozenset[int]:
    """Returns after which steps to evaluate: every so many epochs, and at each stage's end.

    An evaluation less than a quarter of the distance from a stage's start or end, where one is made
    anyway, is left out: two are at most one and a half distances apart.

    Args:
        stages: of the run.
        num_examples: training examples in an epoch.
        every_epochs: 0: at the ends of the stages only.
    """
    ends = {stage.end_step for stage in stages}
    if every_epochs <= 0:
        return frozenset(ends)
    every = every_epochs * num_examples  # examples between two evaluations
    steps = set(ends)
    for stage in stages:
        examples = stage.steps * stage.batch_size
        first = int(stage.first_example // every) + 1
        last = int((stage.first_example + examples) // every)
        for count in range(first, last + 1):
            past = count * every - stage.first_example  # examples of this stage until then
            # The ends of the stages before and of this one are evaluated: not twice in a row.
            after_end = stage.index > 0 and past < every / 4
            before_end = examples - past < every / 4
            if not (after_end or before_end):
                steps.add(stage.start_step + math.ceil(past / stage.batch_size))
    return frozenset(steps)


def stage_memory(
    stages: Sequence[Stage], known: Mapping[tuple[int, int], Program], *, state_bytes: int
) -> tuple[StageMemory, ...]:
    """Returns the memory of each stage, scaled from the nearest known stage where not known.

    Args:
        stages: of the run.
        known: (image size, batch size) -> compiled program; at least one.
        state_bytes: of the train state on each device, which does not grow with the images.
    """
    measured = {size: program.memory for size, program in known.items() if program.memory}

    def pixels(size: tuple[int, int]) -> int:
        return size[0] ** 2 * size[1]

    def memory(stage: Stage) -> StageMemory:
        wanted = (stage.image_size, stage.batch_size)
        if wanted in measured or not measured:
            return StageMemory(measured.get(wanted), estimated=False)
        nearest = min(measured, key=lambda size: abs(pixels(size) - pixels(wanted)))
        factor = pixels(wanted) / pixels(nearest)
        return StageMemory(
            scaled_memory(measured[nearest], fixed=state_bytes, pixels=factor), estimated=True
        )

    return tuple(memory(stage) for stage in stages)


def strengths(stage: Stage, policy: Policy) -> dict[str, str]:
    """Returns a stage's regularisation as text, by name; "-" is what the run does not use."""
    return {
        "magnitude": f"{stage.magnitude:.3g}" if policy.uses_randaugment else "-",
        "dropout": f"{stage.dropout_rate:.3g}",
        "mixup": f"{stage.mixup_alpha:.3g}",
        "cutmix": f"{stage.cutmix_alpha:.3g}",
    }


def plan_table(stages: Sequence[Stage], memory: Sequence[StageMemory], *, policy: Policy) -> str:
    """Returns the stages as a table of text, a line each, with a heading and a total."""
    names = tuple(strengths(stages[0], policy))
    heading = ("stage", "image", "batch", *names, "steps", "epochs", "images", "memory")
    rows = [
        (
            f"{stage.index + 1}",
            f"{stage.image_size} px",
            f"{stage.batch_size}",
            *strengths(stage, policy).values(),
            f"{stage.steps:,}",
            f"{stage.epochs:.2f}",
            f"{stage.steps * stage.batch_size:,}",
            _need_text(need),
        )
        for stage, need in zip(stages, memory, strict=True)
    ]
    total = (
        ["all", "", ""]
        + [""] * len(names)
        + [
            f"{stages[-1].end_step:,}",
            f"{sum(stage.epochs for stage in stages):.2f}",
            f"{sum(stage.steps * stage.batch_size for stage in stages):,}",
            "",
        ]
    )
    table = [heading, *rows, total]
    widths = [max(len(row[column]) for row in table) for column in range(len(heading))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
    if any(need.estimated for need in memory):
        lines.append("memory is per device; ~: estimated by scaling a compiled stage's with pixels")
    else:
        lines.append("memory is per device, of the compiled steps")
    return "\n".join(lines)


def plan_rows(stages: Sequence[Stage], memory: Sequence[StageMemory]) -> list[dict[str, Any]]:
    """Returns the stages as plan.json keeps them: the fields of Stage and the memory."""
    return [
        {
            **dataclasses.asdict(stage),
            "images": stage.steps * stage.batch_size,
            "memory_bytes": need.bytes,
            "memory_estimated": need.estimated,
        }
        for stage, need in zip(stages, memory, strict=True)
    ]


def memory_warnings(
    stages: Sequence[Stage], memory: Sequence[StageMemory], *, device: Any
) -> list[str]:
    """Returns a line for each stage that needs more memory than the device has."""
    stats = device.memory_stats() or {}  # None on CPU
    limit = stats.get("bytes_limit")
    return [
        f"warning: stage {stage.index + 1} needs {_need_text(need)} per device, which has "
        f"{memory_text(limit)}: lower the batch size or set model.remat=True"
        for stage, need in zip(stages, memory, strict=True)
        if limit and need.bytes and need.bytes > limit
    ]


def memory_text(size: int | None) -> str:
    """Returns "0.5 MB", "512 MB" or "30.10 GB"."""
    if size is None:
        return "memory unknown"
    if size >= 10**9:
        return f"{size / 10**9:.2f} GB"
    return f"{size / 10**6:.0f} MB" if size >= 10**7 else f"{size / 10**6:.1f} MB"


def _need_text(need: StageMemory) -> str:
    if need.bytes is None:
        return "unknown"
    return ("~" if need.estimated else "") + memory_text(need.bytes)
