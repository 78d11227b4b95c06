"""Checkpoints of a run: written in the background, checked when read, never lost.

A checkpoint is the TrainState: all randomness and the order of the data follow from (seed, step),
so the state is all a run needs to continue with the same bits. Beside it lie the run's notes, a few
numbers that only the log needs. Orbax writes it: into a temporary folder that is renamed when
complete, so that a killed run leaves either a whole checkpoint or none, and an old one goes only
after the new one is there.

What is added to Orbax here:
- the state is copied to the host first and its arrays are saved as NumPy arrays under their paths
  ("params/stem/conv/kernel"). The train step donates its state; without the copy the writer would
  read buffers that the next step overwrites. A file of plain arrays does not remember devices:
  it is restored onto any number of them. It also costs a third of the time of jax.Arrays.
- a CRC-32 of every array. A damaged newest checkpoint is noticed, set aside, and the one before is
  used; Orbax alone returns a flipped bit as it is.
- the names, shapes and types, so that a checkpoint of another model is refused by name.

    with Checkpoints(workdir.checkpoints, keep_last=2, keep_best=1) as checkpoints:
        state = checkpoints.restore(template, sharding=sharding) or template
        ...
        checkpoints.save(step, state, {"top1": 0.81, "ema_top1": 0.83})
"""

import contextlib
import json
import logging
import math
import os
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from effv2_jax.atomic import write_json
from effv2_jax.errors import UserError

_FORMAT = 1
_LISTED = 6  # differences named in an error before "and N more"


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they are; made if missing.
        keep_last: how many of the newest stay.
        keep_best: how many of those with the best score stay besides; the score is the metric
            "ema_top1", or "top1" where that is missing.
        read_only: only `restore`: nothing is cleaned up or set aside, so that a run may be
            writing into the folder meanwhile.
        say: prints one line about what the user should know; called by process 0 only.

    Attributes:
        folder: where they are.
        notes: of the checkpoint that `restore` returned.
        say: as given; may be replaced later, by a logger's that knows of the live line.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep_last: int = 2,
        keep_best: int = 1,
        read_only: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        self.folder = Path(folder).absolute()
        self.notes: dict[str, Any] = {}
        self.say = say
        self._read_only = read_only
        self._scores = _Scores(self.folder / "scores.json")
        logging.getLogger("absl").addFilter(_not_of_orbax)
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_KeepLastAndBest(keep_last, keep_best, self._scores),
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
                save_root_metadata=False,
                enable_async_checkpointing=not read_only,
            ),
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(),
                "layout": ocp.JsonCheckpointHandler(),
            },
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def steps(self) -> list[int]:
        """The steps that have a complete checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    @property
    def latest_step(self) -> int | None:
        """The newest of `steps`, or None."""
        return max(self.steps, default=None)

    @property
    def best_step(self) -> int | None:
        """The one of `steps` with the best score, or None if none has a score."""
        return max(
            (step for step in self.steps if step in self._scores.values),
            key=lambda step: (self._scores.values[step], step),
            default=None,
        )

    @property
    def busy(self) -> bool:
        """Whether a save is still being written: another one now would wait for it."""
        return self._manager.is_saving_in_progress()

    def save(
        self,
        step: int,
        state: Any,
        metrics: Mapping[str, float] | None = None,
        *,
        notes: Mapping[str, Any] | None = None,
    ) -> bool:
        """Starts writing a checkpoint; returns once the state is copied to the host.

        A save that fails later (a full disk) is reported in one line by the next call, and the
        checkpoints before it stay.

        Args:
            step: the number of finished steps.
            state: a pytree of arrays.
            metrics: of the evaluation at this step, if there was one: they rank the checkpoint.
            notes: what JSON can say, for the process that continues.

        Returns:
            False if there is a checkpoint of this step already; its metrics are then noted.
        """
        self._scores.note(step, metrics)
        self.settle()
        if step in self._manager.all_steps():
            return False
        arrays = {name: _to_host(leaf) for name, leaf in _named_leaves(state).items() if leaf.size}
        layout = {
            "format": _FORMAT,
            "step": step,
            "arrays": _describe(arrays, checksum=True),
            "notes": dict(notes or {}),
        }
        return self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(arrays), layout=ocp.args.JsonSave(layout)
            ),
        )

    def restore(self, template: Any, *, sharding: Any = None) -> Any | None:
        """Reads the newest usable checkpoint.

        Args:
            template: a state of the wanted structure, concrete or from `jax.eval_shape`.
            sharding: where the arrays go: one sharding, or a pytree of them like `template`.
                None: the shardings of the template's arrays, or the default device.

        Returns:
            The state, equal in every bit to the saved one; None if there is no checkpoint.

        Raises:
            UserError: the checkpoint is of another model or optimizer, or all are damaged.
        """
        found = self.steps
        for step in reversed(found):
            problem = None
            try:
                arrays, notes = self._read(step, template)
            except UserError:
                raise
            except Exception as error:  # whatever Orbax raises for a damaged file
                problem = _reason(error)
            if _everywhere(problem is None):
                self.notes = notes
                return _place(arrays, template, sharding)
            self._set_aside(step, problem or "another process could not read it")
        if found:
            if self._read_only:
                raise UserError(f"{self.folder}: none of the checkpoints {found} is usable")
            raise UserError(
                f"{self.folder}: none of the checkpoints {found} is usable, they were renamed to "
                "STEP.damaged; start again to begin from scratch, or use another --workdir"
            )
        return None

    def wait_until_finished(self) -> None:
        """Waits for the save in progress.

        Raises:
            UserError: it failed; the checkpoints before it are still there.
        """
        failure = self._failure_of_last_save()
        if failure:
            raise UserError(failure)

    def close(self) -> None:
        """Waits for the save in progress and ends the writers."""
        self.settle()
        self._manager.close()

    def settle(self) -> None:
        """Waits for the save in progress; says in one line what went wrong in it."""
        failure = self._failure_of_last_save()
        if failure:
            self._report(failure)

    def _failure_of_last_save(self) -> str | None:
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:  # whatever the file system answers
            if jax.process_index() == 0:  # the unfinished one would keep a full disk full
                for folder in self.folder.glob("*.orbax-checkpoint-tmp*"):
                    shutil.rmtree(folder, ignore_errors=True)
            self._manager.reload()  # Orbax has already struck the one it meant to delete after
            return (
                f"{self.folder}: the last checkpoint was not written ({_reason(error)}); the "
                f"newest usable one is of step {self.latest_step}"
            )
        return None

    def _report(self, text: str) -> None:
        if jax.process_index() == 0:
            self.say(text)

    def _read(self, step: int, template: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        layout = self._manager.restore(
            step, args=ocp.args.Composite(layout=ocp.args.JsonRestore())
        ).layout
        wanted = {name: leaf for name, leaf in _named_leaves(template).items() if leaf.size}
        _check_layout(self.folder / str(step), layout["arrays"], _describe(wanted))
        arrays = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.PyTreeRestore())
        ).state
        found = _describe(arrays, checksum=True)
        for name, written in layout["arrays"].items():
            if found.get(name) != written:
                raise ValueError(f"{name} has another checksum than when it was written")
        return arrays, layout.get("notes", {})

    def _set_aside(self, step: int, problem: str) -> None:
        if self._read_only:
            self._report(f"checkpoint of step {step} is not used: {problem}")
            return
        folder = self.folder / str(step)
        if jax.process_index() == 0:
            folder.rename(_unused(folder.with_name(f"{step}.damaged")))
        _everywhere(True)  # nobody reads on before the folder is gone
        self._manager.reload()
        self._report(f"checkpoint of step {step} is damaged ({problem}): kept as {step}.damaged")


class _Scores:
    """The score of each evaluated step, kept in a file beside the checkpoints."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.values: dict[int, float] = {}
        if path.exists():
            try:
                self.values = {int(k): float(v) for k, v in json.loads(path.read_text()).items()}
            except ValueError:  # only the choice of the best is lost
                self.values = {}

    def note(self, step: int, metrics: Mapping[str, float] | None) -> None:
        metrics = metrics or {}
        score = next((metrics[key] for key in ("ema_top1", "top1") if key in metrics), None)
        if score is None or not math.isfinite(score):
            return
        self.values[step] = float(score)
        if jax.process_index() == 0:
            # A full disk must not end the run; the next process then knows one score less.
            with contextlib.suppress(OSError):
                write_json(self._path, {str(k): v for k, v in sorted(self.values.items())})


class _KeepLastAndBest(checkpoint_managers.PreservationPolicy):
    """Orbax's own BestN knows only the metrics given with the save; ours may come later."""

    def __init__(self, last: int, best: int, scores: _Scores) -> None:
        self._last, self._best, self._scores = last, best, scores

    def should_preserve(
        self,
        checkpoints: Sequence[checkpoint_managers.PolicyCheckpointInfo],
        *,
        context: checkpoint_managers.PreservationContext,
    ) -> Sequence[bool]:
        steps = sorted(info.step for info in checkpoints)
        scored = sorted(
            (step for step in steps if step in self._scores.values),
            key=lambda step: (self._scores.values[step], step),
        )
        # max(1, ..): whatever the settings, the newest stays.
        kept = {*steps[-max(1, self._last) :], *(scored[-self._best :] if self._best else ())}
        return [info.step in kept for info in checkpoints]


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Maps "opt_state/0/nu/stem/conv/kernel" to its leaf, for any pytree."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _to_host(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_replicated or leaf.is_fully_addressable):
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    # A copy, always: on CPU np.asarray is a view of the buffer that the next step takes over.
    return np.array(leaf)


def _describe(arrays: Mapping[str, Any], *, checksum: bool = False) -> dict[str, dict[str, Any]]:
    """Maps each name to its shape and dtype, and with `checksum` to the CRC-32 of its bytes."""
    described = {
        name: {"shape": list(array.shape), "dtype": np.dtype(array.dtype).name}
        for name, array in arrays.items()
    }
    if checksum:
        with ThreadPoolExecutor() as pool:  # zlib releases the interpreter lock
            sums = pool.map(_checksum, arrays.values())
            for name, value in zip(arrays, sums, strict=True):
                described[name]["crc32"] = value
    return described


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def _check_layout(
    path: Path, saved: dict[str, dict[str, Any]], wanted: dict[str, dict[str, Any]]
) -> None:
    def text(entry: dict[str, Any]) -> str:
        return f"{entry['dtype']}{entry['shape']}"

    differences = [f"{name} is missing" for name in wanted if name not in saved]
    differences += [f"{name} is not in this run's state" for name in saved if name not in wanted]
    differences += [
        f"{name} is {text(saved[name])}, this run has {text(wanted[name])}"
        for name in wanted
        if name in saved and text(saved[name]) != text(wanted[name])
    ]
    if differences:
        more = len(differences) - _LISTED
        listed = "; ".join(differences[:_LISTED]) + (f"; and {more} more" if more > 0 else "")
        raise UserError(
            f"{path}: a checkpoint of another model or optimizer: {listed}. "
            "Use the config it was made with, or another --workdir"
        )


def _place(arrays: Mapping[str, np.ndarray], template: Any, sharding: Any) -> Any:
    names = list(_named_leaves(template))
    leaves, treedef = jax.tree.flatten(template)
    if sharding is None or isinstance(sharding, jax.sharding.Sharding):
        shardings = [sharding or getattr(leaf, "sharding", None) for leaf in leaves]
    else:
        shardings = treedef.flatten_up_to(sharding)

    def put(name: str, leaf: Any, target: jax.sharding.Sharding | None) -> jax.Array:
        value = arrays[name] if leaf.size else np.zeros(leaf.shape, leaf.dtype)
        if target is None:
            return jax.device_put(value)
        return jax.make_array_from_callback(value.shape, target, lambda index: value[index])

    placed = [put(*each) for each in zip(names, leaves, shardings, strict=True)]
    return jax.tree.unflatten(treedef, placed)


def _reason(error: Exception) -> str:
    """Returns the error in one line, of a length that a person reads."""
    text = (str(error).splitlines() or [""])[0]
    text = f"{type(error).__name__}: {text}"
    return text if len(text) <= 160 else f"{text[:70]} ... {text[-80:]}"


def _not_of_orbax(record: logging.LogRecord) -> bool:
    """Drops what Orbax logs: pages of tracebacks of errors that it raises too, said here once."""
    return f"{os.sep}orbax{os.sep}" not in record.pathname


def _everywhere(ok: bool) -> bool:
    """Whether `ok` holds on every process; also a barrier."""
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.array(ok))))


def _unused(path: Path) -> Path:
    number = 1
    candidate = path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate
