"""Contestants in processes of their own, measured in turns: A B C A B C ...

Only one process computes at a time, so neighbours in time meet the same machine, and ratios are
taken pair by pair. Every process gets the same cores, as many threads as cores, and the allocator
that this project's own commands choose (`Contestant.one_arena`).
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from effv2_jax.errors import UserError
from effv2_jax.startup import ONE_ARENA

WORKERS = Path(__file__).parent / "workers"

_MARGIN = 1.3  # of memory: a peer may need so much more than this project
_WARM_STEPS = 2  # the first touch memory for the first time; the last of them is timed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contestant:
    """Who takes part.

    Attributes:
        name: in tables, "effv2_jax" or a peer's.
        command: the interpreter and the worker with its arguments.
        task: what `prepare` is told.
        environment: set beside what is there.
        inherits: variables it takes from the first contestant, which chose its own.
        one_arena: whether it takes jemalloc's one arena too, which is for XLA's threads;
            TensorFlow infers 1.3 times as fast on two cores with jemalloc's own number.
        asked: how it was told to compute, for the record: what tells it from others of its name.
    """

    name: str
    command: tuple[str, ...]
    task: Mapping[str, Any]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    inherits: tuple[str, ...] = ()
    one_arena: bool = False
    asked: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class ContestError(UserError):
    """A contestant cannot do its task or failed at it."""


class Worker:
    """A running worker; see workers/serve.py for what it understands.

    Args:
        contestant: whom to start.
        cores: numbers of the cores it may use.
        environment: of the process.
    """

    def __init__(
        self, contestant: Contestant, *, cores: Sequence[int], environment: Mapping[str, str]
    ) -> None:
        self.contestant = contestant
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        try:
            with bound(cores):
                self._process = subprocess.Popen(
                    contestant.command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._errors,
                    env=dict(environment),
                    text=True,
                    bufsize=1,
                )
        except OSError as error:
            raise UserError(
                f"{contestant.name}: cannot start {contestant.command[0]}: {error.strerror}; "
                "expected a Python interpreter (--peer-python)"
            ) from None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, do: str, **content: Any) -> dict[str, Any]:
        """Sends a request and waits for the answer.

        Raises:
            ContestError: the worker refuses, fails or ends.
        """
        name = self.contestant.name
        try:
            self._process.stdin.write(json.dumps({"do": do, **content}) + "\n")
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            raise ContestError(
                f"{name}: its process ended with {code} at {do!r}: {self._last_words()}"
            )
        answer = json.loads(line)
        if "refused" in answer:
            raise ContestError(f"{name}: {answer['refused']}")
        if "failed" in answer:
            raise ContestError(f"{name}: failed at {do!r}: {answer['failed']}")
        return answer

    def close(self) -> None:
        """Ends the process."""
        if self._process.poll() is None:
            try:
                self._process.stdin.write('{"do": "quit"}\n')
                self._process.stdin.close()
                self._process.wait(timeout=20)
            except (BrokenPipeError, subprocess.TimeoutExpired):
                self._process.kill()
                self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        return lines[-1][:300] if lines else "without a word"


@dataclasses.dataclass(kw_only=True)
class Measured:
    """What a contest found out about one contestant.

    Attributes:
        contestant: who.
        facts: what its worker said.
        rounds: (wall, processor) seconds per step.
        memory: what the worker said after the last round, of the process and of a step.
        steps: per round.
        in_turns: whether the others were measured between its rounds.
    """

    contestant: Contestant
    facts: dict[str, Any]
    rounds: list[tuple[float, float]]
    memory: dict[str, Any]
    steps: int
    in_turns: bool


def compete(
    contestants: Sequence[Contestant],
    *,
    cores: Sequence[int],
    rounds: int,
    steps: int,
    seconds: float,
) -> list[Measured]:
    """Measures contestants in turns; the first is this project's, whose allocator all get.

    Args:
        contestants: at least one.
        cores: which may be used.
        rounds: of each.
        steps: per round; 0: as many as take about `seconds`.
        seconds: see `steps`.

    Returns:
        As `contestants`. Where memory does not suffice for all at once they were measured one
        after the other, which `in_turns` says.

    Raises:
        ContestError: a contestant cannot do it.
    """
    with ExitStack() as stack:
        entered: list[tuple[Worker, dict[str, Any], int]] = []
        chosen: dict[str, str] = {}
        for contestant in contestants:
            worker, facts, count = _enter(contestant, stack, cores, chosen, steps, seconds)
            if not entered:
                chosen = facts.get("variables", {})
                others = len(contestants) - 1
                if (
                    others * _MARGIN * (worker.ask("memory")["resident_bytes"] or 0)
                    > _free_memory()
                ):
                    break
            entered.append((worker, facts, count))
        else:
            return _in_turns(entered, rounds)
    return list(_apart(contestants, cores, chosen, rounds, steps, seconds))


def _in_turns(
    entered: Sequence[tuple[Worker, dict[str, Any], int]], rounds: int, together: bool = True
) -> list[Measured]:
    found: list[list[tuple[float, float]]] = [[] for _ in entered]
    for _ in range(rounds):
        for (worker, _, count), times in zip(entered, found, strict=True):
            answer = worker.ask("run", steps=count)
            times.append((answer["wall"], answer["processor"]))
    return [
        Measured(
            contestant=worker.contestant,
            facts=facts,
            rounds=times,
            memory=worker.ask("memory") | worker.ask("step memory"),
            steps=count,
            in_turns=together,
        )
        for (worker, facts, count), times in zip(entered, found, strict=True)
    ]


def _apart(
    contestants: Sequence[Contestant],
    cores: Sequence[int],
    chosen: Mapping[str, str],
    rounds: int,
    steps: int,
    seconds: float,
) -> Iterator[Measured]:
    for contestant in contestants:
        with ExitStack() as stack:
            entered = _enter(contestant, stack, cores, chosen, steps, seconds)
            yield from _in_turns([entered], rounds, together=False)


def _enter(
    contestant: Contestant,
    stack: ExitStack,
    cores: Sequence[int],
    chosen: Mapping[str, str],
    steps: int,
    seconds: float,
) -> tuple[Worker, dict[str, Any], int]:
    """Starts a worker, prepares and warms it up; returns it, its facts, and steps per round.

    One that tried several ways is started again with the best one alone: the others' memory must
    not be counted.
    """
    environment = environment_of(contestant, chosen)
    task = dict(contestant.task)
    worker = stack.enter_context(Worker(contestant, cores=cores, environment=environment))
    facts = worker.ask("prepare", **task)
    if len(facts.get("tried", ())) > 1:
        worker.close()
        worker = stack.enter_context(Worker(contestant, cores=cores, environment=environment))
        task["candidate"] = facts["candidate"]
        facts = {
            **worker.ask("prepare", **task),
            "tried": facts["tried"],
            "compile_seconds": facts["compile_seconds"],
        }
    for _ in range(_WARM_STEPS):
        answer = worker.ask("run", steps=1)
    return worker, facts, steps or max(1, min(1000, round(seconds / answer["wall"])))


def environment_of(contestant: Contestant, chosen: Mapping[str, str]) -> dict[str, str]:
    """The variables of a contestant's process; `chosen` by the first one."""
    taken = {name: chosen[name] for name in contestant.inherits if name in chosen}
    if "MALLOC_CONF" in taken and not contestant.one_arena:
        taken["MALLOC_CONF"] = taken["MALLOC_CONF"].removesuffix(ONE_ARENA)
    return {**os.environ, **taken, **contestant.environment}


def ratios(first: Measured, other: Measured) -> list[float]:
    """How many times as fast the first is, round by round."""
    return [
        theirs / ours for (ours, _), (theirs, _) in zip(first.rounds, other.rounds, strict=True)
    ]


def rate(measured: Measured, batch: int) -> tuple[float, float, float]:
    """Images per second: median, lowest, highest of the rounds."""
    rates = sorted(batch / wall for wall, _ in measured.rounds)
    return statistics.median(rates), rates[0], rates[-1]


def usable_cores() -> list[int]:
    """Numbers of the cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def missing(python: str, modules: Sequence[str]) -> list[str]:
    """Asks another interpreter which of the modules it lacks; imports none of them.

    Raises:
        UserError: it is no Python interpreter.
    """
    code = (
        "import importlib.util, json, sys\n"
        "print(json.dumps([m for m in sys.argv[1:] if not importlib.util.find_spec(m)]))"
    )
    try:
        done = subprocess.run(
            [python, "-c", code, *modules], capture_output=True, text=True, timeout=120
        )
        return json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        raise UserError(
            f"--peer-python: {python} is no Python interpreter that runs; expected the path of one"
        ) from None


def start(worker: str, python: str = sys.executable, *arguments: str) -> tuple[str, ...]:
    """Returns the command of a worker."""
    return (python, str(WORKERS / worker), *arguments)


@contextmanager
def bound(cores: Sequence[int]) -> Iterator[None]:
    """Keeps processes that are started inside to these cores, where the system can."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)  # of this thread; a child inherits it
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _free_memory() -> float:
    """Bytes that can be had without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return float("inf")


def utc() -> str:
    """The time, for records."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
