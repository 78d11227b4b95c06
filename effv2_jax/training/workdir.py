"""The folder of a run: who uses it, with which config, by which plan.

workdir/
    LOCK              the run that uses it now
    config.json       the complete config
    plan.json         the stages
    metrics.jsonl     what was measured, one object a line (training/logging.py)
    checkpoints/      to continue from (training/checkpoint.py)
    final.safetensors, curves.png

A run that is started again on its workdir continues it, if its config says the same.

    with open_workdir("runs/digits", config) as workdir:
        if workdir.resuming: ...
        workdir.write_plan(stages)
"""

import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from effv2_jax.atomic import write_json
from effv2_jax.config import base_config
from effv2_jax.errors import UserError

# Settings that a continued run may change without any effect on what it computes.
_FREE = (
    "runtime",
    "data.workers",
    "data.threads",
    "data.prefetch",
    "data.cache",
    "data.dir",
    "eval.every_epochs",
    "train.on_nonfinite",
)
# Settings that change the rounding of sums or what is reported, but not what is learned: allowed,
# and said, because from here on the numbers are not those of an undisturbed run.
_ANNOUNCED = (
    "eval",
    *(f"model.{name}" for name in ("remat", "remat_fused", "remat_norms", "lowering")),
    "runtime.devices",
)


@dataclasses.dataclass(frozen=True)
class Workdir:
    """The paths of one run.

    Attributes:
        path: the folder.
        resuming: whether a run with this config was started here before.
    """

    path: Path
    resuming: bool

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The file of measurements, one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def final_weights(self) -> Path:
        """The weights at the end of the run."""
        return self.path / "final.safetensors"

    def write_plan(self, stages: Sequence[Any], **facts: Any) -> None:
        """Writes plan.json: the stages (dataclasses or dicts) and other facts of the run."""
        rows = [dataclasses.asdict(s) if dataclasses.is_dataclass(s) else dict(s) for s in stages]
        if _is_writer():
            write_json(self.path / "plan.json", {**facts, "stages": rows})


@contextlib.contextmanager
def open_workdir(
    path: str | Path, config: Mapping[str, Any], *, say: Callable[[str], None] = print
) -> Iterator[Workdir]:
    """Locks the folder for this run and checks that the config continues what is there.

    Of several processes, only process 0 locks and writes; all check.

    Args:
        path: the folder; made if missing.
        config: the complete config of the run.
        say: prints one line about what the user should know; called by process 0 only.

    Yields:
        The Workdir; it is locked until the end of the block, or of the process.

    Raises:
        UserError: another run uses the folder, or it belongs to a run with another config, or it
            cannot be written.
    """
    if "://" in str(path):
        raise UserError(f"--workdir {path}: expected a local or mounted folder, found an address")
    folder = Path(path).absolute()
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if _is_writer():
                stack.enter_context(_lock(folder / "LOCK", say))
        except OSError as error:
            raise UserError(
                f"--workdir {path}: cannot be used: {error.strerror or error}; give a folder that "
                "can be written"
            ) from None
        resuming = _check_config(folder / "config.json", plain(config), say)
        if _is_writer():
            write_json(folder / "config.json", plain(config))
        yield Workdir(folder, resuming)


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config as JSON keeps it: dicts, lists, numbers, strings, None."""
    return json.loads(json.dumps(config.to_dict() if hasattr(config, "to_dict") else dict(config)))


# The lock belongs to the open file, which forked children share: a loader process that outlives its
# killed run would hold the folder. So children close their copy.
_held: set[IO[str]] = set()


def _close_held() -> None:
    for file in _held:
        file.close()


os.register_at_fork(after_in_child=_close_held)


@contextlib.contextmanager
def _lock(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Holds the lock of the file; the system frees it when the process ends, however it ends."""
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another run"
            raise UserError(
                f"--workdir {path.parent}: in use by {holder}; wait for it, stop it, or give "
                "another --workdir"
            ) from None
        except OSError as error:  # some network file systems have no locks
            say(
                f"{path.parent} cannot be locked ({error.strerror}): nothing stops a second run "
                "on it"
            )
        _held.add(file)
        try:
            file.truncate(0)
            now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            file.write(f"pid {os.getpid()} on {socket.gethostname()}, started {now}\n")
            file.flush()
            yield
            file.truncate(0)
        finally:
            _held.discard(file)


def _check_config(path: Path, config: dict[str, Any], say: Callable[[str], None]) -> bool:
    """Returns whether there was a config, and refuses one that does not continue it."""
    if not path.exists():
        return False
    try:
        old = _flat(json.loads(path.read_text()))
    except ValueError as error:
        raise UserError(
            f"{path}: not JSON ({error}); restore it, or use another --workdir"
        ) from None
    # A file of an earlier version lacks the options that came later: they had their defaults.
    old = {**_flat(plain(base_config())), **old}
    new = {**_flat(plain(base_config())), **_flat(config)}
    missing = "(not there)"
    changed = {
        key: f"{key} was {old.get(key, missing)!r}, is {new.get(key, missing)!r}"
        for key in sorted({*old, *new})
        if old.get(key, missing) != new.get(key, missing)
    }
    announced = [text for key, text in changed.items() if _within(key, _ANNOUNCED)]
    refused = [text for key, text in changed.items() if not _within(key, (*_FREE, *_ANNOUNCED))]
    if refused and not _has_checkpoint(path.parent):
        return False  # nothing was learned with the old values: a run that failed at its start
    if refused:
        raise UserError(
            f"{path.parent}: belongs to a run with another config: {'; '.join(refused)}. "
            "Give the same values to continue it, or another --workdir to start anew"
        )
    if announced and _is_writer():
        what = "; ".join(announced)
        say(f"continuing with a changed config, numbers may differ from here on: {what}")
    return True


def _has_checkpoint(folder: Path) -> bool:
    # Complete ones are named by their step; folders being written have a longer name.
    return any(entry.name.isdigit() for entry in folder.glob("checkpoints/*"))


def _within(key: str, prefixes: Sequence[str]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _is_writer() -> bool:
    import jax  # not at the top: tools read a workdir's files without starting JAX

    return jax.process_index() == 0
