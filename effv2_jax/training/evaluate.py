"""Exact metrics over a data set: every example counts once, whatever the batch and the devices.

The last batch is padded and the padding masked; sums over examples are added in float64 and
divided once, at the end. Raw weights and their moving average are measured on the same decoded
images in one pass. A step may return sums over a batch (training: `Evaluator.__call__`) or an
answer for every example (--mode eval: `Evaluator.answers`).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from effv2_jax.data import loader
from effv2_jax.data.device import DevicePrefetch, to_device
from effv2_jax.data.kinds import Kind
from effv2_jax.training import mesh as meshes
from effv2_jax.training.answers import join_answers
from effv2_jax.training.compile import Program, Programs
from effv2_jax.training.metrics import Answers

SUMS = ("loss", "top1", "top5")

# Batches handed to the device ahead of the one whose sums are fetched.
_IN_FLIGHT = 2


class Evaluator:
    """Evaluates variables on one data set at one image size; compiles one program.

    Args:
        eval_step: (variables, batch) -> sums over the batch's unmasked examples: "loss", "top1",
            "top5", "count" (`step.make_eval_step`); or answers (`answers.make_answer_step`).
        source: the evaluation examples.
        data_config: the config's `data` section.
        image_size: px.
        batch_size: global; raised to a multiple of the devices, lowered to the data set's size.
        mesh: the devices.
        programs: where the program is compiled and kept.
        kind: of preprocessing; None: the config's.
    """

    def __init__(
        self,
        eval_step: Callable[[Any, Any], Mapping[str, jax.Array]],
        *,
        source: Any,
        data_config: Any,
        image_size: int,
        batch_size: int,
        mesh: Mesh,
        programs: Programs,
        kind: Kind | None = None,
    ) -> None:
        self._source, self._data_config, self._kind = source, data_config, kind
        self._mesh, self._programs = mesh, programs
        self.image_size = image_size
        self.left_out = 0  # broken pictures in the last evaluation, with data.on_corrupt='skip'
        self.batch_size = _padded(min(batch_size, max(1, len(source))), mesh.size)
        self._jitted = jax.jit(eval_step)

    @property
    def _name(self) -> str:
        return f"evaluation, {self.image_size} px, batch {self.batch_size}"

    def prepare(self, variables: Any, batch: Any) -> None:
        """Starts compiling in the background.

        Args:
            variables: shapes and shardings of what will be evaluated.
            batch: shapes and shardings of a batch of `batch_size`.
        """
        self._programs.prepare(self._name, lambda: self._jitted.lower(variables, batch))

    def __call__(
        self, weights: Mapping[str, Any], *, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """Returns the metrics of each set of variables.

        Args:
            weights: prefix of the metrics' names ("" or "ema_") -> variables.
            stop: asked before each batch; once true, the evaluation is given up.

        Returns:
            For each prefix: PREFIXloss, PREFIXtop1, PREFIXtop5, means over all examples; None if
            given up.

        Raises:
            RuntimeError: the loader did not serve every example exactly once.
        """
        totals = {prefix: dict.fromkeys((*SUMS, "count"), 0.0) for prefix in weights}
        try:
            for sums in self._results(weights, stop):
                for prefix, values in sums.items():
                    for name in totals[prefix]:
                        totals[prefix][name] += float(values[name])
        except _Stopped:
            return None
        return self._means(totals)

    def answers(self, weights: Mapping[str, Any]) -> dict[str, Answers]:
        """Returns the answer of each set of variables to every example.

        Args:
            weights: prefix ("" or "ema_") -> variables.

        Raises:
            RuntimeError: as of a call.
        """
        found = list(self._results(weights, lambda: False))
        joined = {prefix: join_answers([each[prefix] for each in found]) for prefix in weights}
        for answers in joined.values():
            self._check_count(len(answers))
        return joined

    def _results(
        self, weights: Mapping[str, Any], stop: Callable[[], bool]
    ) -> Iterator[dict[str, Mapping[str, np.ndarray]]]:
        """Yields what the step returns for each batch, fetched some batches later."""
        waiting: list[dict[str, Mapping[str, jax.Array]]] = []
        with self._batches() as batches:
            for batch in batches:
                if stop():
                    raise _Stopped
                program = self._program(weights, batch)
                waiting.append({prefix: program.run(v, batch) for prefix, v in weights.items()})
                if len(waiting) > _IN_FLIGHT:
                    yield jax.device_get(waiting.pop(0))
        for results in waiting:
            yield jax.device_get(results)

    def _batches(self) -> DevicePrefetch:
        batches = loader.eval_batches(
            self._source,
            self._data_config,
            image_size=self.image_size,
            batch_size=self.batch_size,
            kind=self._kind,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        return to_device(batches, meshes.batch_sharding(self._mesh))

    def _program(self, weights: Mapping[str, Any], batch: dict[str, jax.Array]) -> Program:
        variables = next(iter(weights.values()))
        return self._programs.get(self._name, lambda: self._jitted.lower(variables, batch))

    def _means(self, totals: dict[str, dict[str, float]]) -> dict[str, float]:
        means = {}
        for prefix, sums in totals.items():
            count = round(sums["count"])
            self._check_count(count)
            for name in SUMS:
                means[prefix + name] = sums[name] / count if count else math.nan
        return means

    def _check_count(self, count: int) -> None:
        skips = self._data_config.on_corrupt == "skip"
        if count > len(self._source) or (count < len(self._source) and not skips):
            raise RuntimeError(
                f"evaluation counted {count} examples of {len(self._source)}: each must count "
                "exactly once"
            )
        self.left_out = len(self._source) - count


class _Stopped(Exception):
    """The evaluation was given up."""


def _padded(batch_size: int, devices: int) -> int:
    return -(-batch_size // devices) * devices
