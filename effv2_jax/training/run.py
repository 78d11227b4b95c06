"""What lives as long as a run: programs, batches, logger, and what is done between two steps."""

import collections
import contextlib
import functools
import math
import time
from collections.abc import Mapping
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from effv2_jax import startup
from effv2_jax.data.device import to_device
from effv2_jax.data.loader import train_batches
from effv2_jax.errors import UserError
from effv2_jax.training import channel_parallel, plan, products, setup
from effv2_jax.training import mesh as meshes
from effv2_jax.training.checkpoint import Checkpoints
from effv2_jax.training.compile import Program, Programs, StepPrograms, device_bytes
from effv2_jax.training.evaluate import Evaluator
from effv2_jax.training.logging import MetricsLogger, repair
from effv2_jax.training.profile import StageTrace
from effv2_jax.training.progressive import Stage, stage_at
from effv2_jax.training.signals import StopRequest
from effv2_jax.training.step import TrainState, make_eval_step, make_train_step, stage_knobs
from effv2_jax.training.workdir import Workdir

# All stages are compiled before the first step if the first program takes less than this: it came
# from the compilation cache, or the network is small. Otherwise the memory of the later stages is
# estimated at first, and measured when the background thread gets to them.
_CHEAP_SECONDS = 3.0

_EVALUATED = tuple(
    f"{prefix}{name}" for prefix in ("", "ema_") for name in ("loss", "top1", "top5")
)


class NonFiniteError(UserError):
    """The loss, a gradient or the state is not finite; the run was stopped."""


class Run:
    """What lives as long as the run: programs, batches, logger, and the number of finished steps.

    Args:
        parts: what the run is made of.
        folder: the locked workdir.
        checkpoints: of the run.
        stop: the signals.
        start_step: finished steps of the state the run starts with.
        started: `time.monotonic()` when the command began.
    """

    def __init__(
        self,
        parts: setup.Setup,
        folder: Workdir,
        checkpoints: Checkpoints,
        stop: StopRequest,
        *,
        start_step: int,
        started: float,
    ) -> None:
        self.step = start_step
        self._start_step, self._started = start_step, started
        self._parts, self._config, self._folder = parts, parts.config, folder
        self._checkpoints, self._stop = checkpoints, stop
        self._evaluation_steps = plan.evaluation_steps(
            parts.stages,
            num_examples=parts.num_examples,
            every_epochs=self._config.eval.every_epochs,
        )
        self._results = self._recorded_results()
        self._waiting: tuple[int, Mapping[str, jax.Array]] | None = None
        # The steps since the last record; those before an interruption are of its record too.
        self._interval: list[dict[str, float]] = list(checkpoints.notes.get("interval", ()))
        self._last_save = time.monotonic()
        self._compiled: collections.deque[Program] = collections.deque()
        self._stack = contextlib.ExitStack()

        model, recipe, mesh = parts.mesh_model, parts.recipe, parts.mesh
        self._programs = self._stack.enter_context(
            Programs(
                devices=len(mesh.local_devices),
                background=self._config.runtime.background_compile,
                on_compiled=self._compiled.append,
            )
        )
        self._steps = StepPrograms(
            self._programs,
            make_train_step(model, recipe, mesh=mesh),
            state=functools.partial(parts.train_state, setup.state_shapes(parts)),
            batch=parts.train_batch,
            knobs=self._knobs(parts.stages[0]),
        )
        self._evaluator = Evaluator(
            make_eval_step(model, recipe, mesh=mesh),
            source=parts.eval_source,
            data_config=self._config.data,
            image_size=parts.eval_size,
            batch_size=parts.eval_batch_size,
            mesh=mesh,
            programs=self._programs,
        )
        self._logger = self._stack.enter_context(
            MetricsLogger(
                folder.path,
                parts.stages,
                num_examples=parts.num_examples,
                resume_step=start_step,
                tensorboard=self._config.runtime.tensorboard,
            )
        )
        self._pictures = train_batches(
            parts.train_source,
            parts.stages,
            self._config.data,
            seed=self._config.train.seed,
            start_step=start_step,
            stop_step=parts.stages[-1].end_step,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        self._batches = self._stack.enter_context(
            to_device(self._pictures, meshes.batch_sharding(mesh), depth=self._config.data.prefetch)
        )

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def announce(self, state: TrainState) -> None:
        """Prints what will run and the plan; compiles the first program for its memory."""
        parts, say = self._parts, self._logger.say
        for line in setup.describe(parts, state):
            say(line)
        if self.step >= parts.stages[-1].end_step:
            say(f"nothing left to train: the run ended at step {self.step}")
            return
        if self.step:
            say(f"continuing after step {self.step}")
        first = stage_at(parts.stages, self.step)
        say("compiling the first step (a moment if it is in the compilation cache)")
        program = self._steps.get(first.image_size, first.batch_size)
        # Asked of one process: all must compile in the same order, they may wait for each other.
        if _from_first_process(program.seconds < _CHEAP_SECONDS):
            for stage in parts.stages[first.index + 1 :]:
                self._steps.get(stage.image_size, stage.batch_size)
        memory = self._write_plan(state)
        say(plan.plan_table(parts.stages, memory, policy=parts.recipe.images.policy))
        for warning in plan.memory_warnings(
            parts.stages, memory, device=parts.mesh.local_devices[0]
        ):
            say(warning)
        self._note_compiled(state)
        variables = setup.shapes_of({"params": state.params, "batch_stats": state.batch_stats})
        self._evaluator.prepare(variables, parts.eval_batch(self._evaluator.batch_size))

    def train_stage(self, stage: Stage, state: TrainState) -> TrainState:
        """Trains to the end of a stage; the program of the next one is compiled meanwhile."""
        program = self._steps.get(stage.image_size, stage.batch_size)
        for following in self._parts.stages[stage.index + 1 : stage.index + 2]:
            self._steps.prepare(following.image_size, following.batch_size)
        before = self._parts.stages[max(0, stage.index - 1)]
        if (before.image_size, before.batch_size) != (stage.image_size, stage.batch_size):
            startup.release_freed_memory()  # its steps needed a block of another size
        shardings = self._parts.state_shardings(state, stage.image_size, stage.batch_size)
        state = channel_parallel.move(state, shardings)
        knobs = self._knobs(stage)
        trace = StageTrace(self._config.runtime.profile, stage, start_step=self.step)
        self._logger.begin_stage(stage, plan.strengths(stage, self._parts.recipe.images.policy))
        with contextlib.closing(trace):
            while self.step < stage.end_step:
                if number := self._agree(self._stop.signal or 0):
                    self._save_and_exit(state, number)
                self._batches.data_wait = 0.0
                batch = next(self._batches)
                trace.before_step(self.step)
                state, metrics = program.run(state, batch, knobs)
                self.step += 1
                trace.after_step(self.step, metrics)
                self._logger.step(self.step, data_wait=self._batches.data_wait)
                # While the device works on this step, the host looks at the one before.
                self._look_at_waiting()
                self._waiting = (self.step, metrics)
                self._note_compiled(state)
                if self.step in self._evaluation_steps:
                    self._evaluate(state)
                elif self._save_is_due():
                    self._save(state)
        return state

    def evaluate_if_missing(self, state: TrainState) -> None:
        """Makes up for an evaluation that a signal prevented just before the run was left."""
        missing = self.step in self._evaluation_steps and not self._results
        if _from_first_process(missing):
            self._evaluate(state)

    def finish(self, state: TrainState) -> dict[str, float]:
        """Writes the final weights and the curves; returns the last evaluation's metrics."""
        self._checkpoints.settle()
        if jax.process_index() == 0:
            products.write_final_weights(self._folder, self._parts, state, self._results)
            products.write_curves(self._folder)
        if skipped := int(state.skipped):
            self._logger.say(f"{skipped} steps were skipped: loss or gradient not finite")
        if self._pictures.num_skipped:
            self._logger.say(
                f"{len(self._pictures.skipped)} broken pictures were replaced by others, "
                f"{self._pictures.num_skipped} times; the first: {self._pictures.skipped[0]}"
            )
        seconds = time.monotonic() - self._started
        self._logger.say(products.summary(self._folder, self._results, seconds=seconds))
        return dict(self._results)

    def _evaluate(self, state: TrainState) -> None:
        """Evaluates raw and averaged weights, records it, saves a checkpoint that is ranked."""
        self._look_at_waiting()
        jax.block_until_ready(state)
        alone = jax.process_count() == 1  # else all would have to give up at the same batch
        with self._logger.paused():
            results = self._evaluator(
                channel_parallel.whole(
                    setup.evaluated_variables(self._config, state), self._parts.mesh
                ),
                stop=lambda: alone and self._stop.requested,
            )
        if results is None:
            self._save_and_exit(state, self._stop.signal)
        self._results = results
        self._logger.evaluation(self.step, results)
        if self._evaluator.left_out:
            self._logger.say(f"evaluation left out {self._evaluator.left_out} broken pictures")
        self._save(state, results)

    def _save(self, state: TrainState, results: Mapping[str, float] | None = None) -> None:
        """Starts a checkpoint of the state, unless it is not finite."""
        self._look_at_waiting()
        with self._logger.paused():
            broken = setup.nonfinite_leaf(state)
            if broken:
                self._stop_diverged(self.step, f"{broken} is not finite")
            # A copy: it is written in the background, while the next steps are added.
            notes = {"interval": list(self._interval)}
            self._checkpoints.save(self.step, state, results, notes=notes)
        self._last_save = time.monotonic()

    def _save_is_due(self) -> bool:
        runtime = self._config.runtime
        if runtime.checkpoint_every_steps and self.step % runtime.checkpoint_every_steps == 0:
            return True
        minutes = (time.monotonic() - self._last_save) / 60
        due = minutes >= runtime.checkpoint_every_minutes and not self._checkpoints.busy
        return bool(self._agree(int(due)))

    def _save_and_exit(self, state: TrainState, number: int) -> NoReturn:
        self._save(state)
        self._checkpoints.settle()
        saved = self._checkpoints.latest_step or 0
        outcome = "the state is saved, the same command continues"
        if saved != self.step:  # the reason was said
            outcome = f"the same command continues after step {saved}"
        self._logger.say(f"stopped by signal {int(number)} after step {self.step}; {outcome}")
        raise SystemExit(128 + number)  # as shells have it

    def _look_at_waiting(self) -> None:
        """Fetches the metrics of the last step not looked at, checks and records them."""
        if self._waiting is None:
            return
        step, metrics = self._waiting
        self._waiting = None
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        if not values.pop("finite") and self._config.train.on_nonfinite == "stop":
            what = f"loss {values['loss']:g}, gradient norm {values['grad_norm']:g}"
            self._stop_diverged(step, what)
        if step == self._start_step + 1:
            seconds = time.monotonic() - self._started
            self._logger.say(f"first step done after {seconds:.1f} s")
        self._interval.append(values)
        if step % self._config.runtime.log_every_steps == 0 or step in self._evaluation_steps:
            self._logger.train(step, _interval_means(self._interval))
            self._interval = []

    def _stop_diverged(self, step: int, what: str) -> NoReturn:
        self._checkpoints.settle()
        stages, good = self._parts.stages, self._checkpoints.latest_step
        stage = stage_at(stages, step - 1)
        where = f"stage {stage.index + 1} of {len(stages)}, {stage.image_size} px"
        saved = "there is no checkpoint yet"
        if good is not None:
            saved = f"the last good checkpoint is {self._checkpoints.folder / str(good)}"
        raise NonFiniteError(
            f"step {step} ({where}): {what}; stopped, {saved}. Lower train.learning_rate "
            "or set train.gradient_clip in a new --workdir, or continue here with "
            "--config.train.on_nonfinite=skip"
        )

    def _knobs(self, stage: Stage) -> dict[str, jax.Array]:
        knobs = stage_knobs(stage, self._parts.recipe, seed=self._config.train.seed)
        return meshes.put_replicated(knobs, self._parts.mesh)

    def _note_compiled(self, state: TrainState) -> None:
        """Says which programs were compiled since the last call, and completes plan.json."""
        if not self._compiled:
            return
        while self._compiled:
            program = self._compiled.popleft()
            self._logger.say(
                f"compiled in {program.seconds:.1f} s: {program.name}, "
                f"{plan.memory_text(program.memory)}"
            )
        self._write_plan(state)

    def _write_plan(self, state: TrainState) -> tuple[plan.StageMemory, ...]:
        stages = self._parts.stages
        known = {
            size: program
            for size in {(stage.image_size, stage.batch_size) for stage in stages}
            if (program := self._steps.finished(*size)) is not None
        }
        memory = plan.stage_memory(stages, known, state_bytes=device_bytes(state))
        self._folder.write_plan(plan.plan_rows(stages, memory), **setup.facts(self._parts, state))
        return memory

    def _recorded_results(self) -> dict[str, float]:
        """The evaluation of the step the run continues from, if it was recorded."""
        if jax.process_index() != 0:
            return {}
        for record in repair(self._folder.metrics, last_step=self._start_step):
            if record["step"] == self._start_step and record["split"] == "eval":
                return {name: record[name] for name in _EVALUATED if name in record}
        return {}

    def _agree(self, value: int) -> int:
        """The largest value of all processes; of several, only at the steps that are logged."""
        if jax.process_count() == 1:
            return value
        if self.step % self._config.runtime.log_every_steps:
            return 0
        return int(np.max(multihost_utils.process_allgather(np.array(value))))


def _interval_means(interval: list[dict[str, float]]) -> dict[str, float]:
    """Means of loss and accuracy over the steps since the last record; the rest is of the last."""
    record = dict(interval[-1])
    record["learning_rate"] = record.pop("lr")
    for name in ("loss", "xent", "top1"):
        finite = [values[name] for values in interval if math.isfinite(values[name])]
        record[name] = sum(finite) / len(finite) if finite else math.nan
    return record


def _from_first_process(value: bool) -> bool:
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.array(value)))
