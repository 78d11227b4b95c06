"""Step programs: one compiled program per image size and batch size, made ahead of its use.

A stage changes traced values (magnitude, dropout, mixup ...) without a new program; only another
image size or batch size needs one. It is compiled in a background thread while the stage before
it trains, and its memory is known before it runs (`memory_analysis`).
"""

import dataclasses
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from effv2_jax import startup


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program and what it cost.

    Attributes:
        name: what it is, for people.
        run: the program; called with arrays of exactly the shapes it was compiled for.
        seconds: wall time of tracing, lowering and compiling (or of reading it from the cache).
        memory: bytes on each device while it runs: arguments, outputs and temporaries, buffers
            that are reused counted once. None where the backend does not say.
    """

    name: str
    run: Callable[..., Any]
    seconds: float
    memory: int | None


class Programs:
    """Compiled programs by name; each is compiled once, on request or ahead in the background.

    Args:
        devices: of this process, that compute the programs.
        background: whether `prepare` starts at once; otherwise it does nothing and `get` compiles.
        on_compiled: called with each new program, from the thread that compiled it.
    """

    def __init__(
        self,
        *,
        devices: int = 1,
        background: bool = True,
        on_compiled: Callable[[Program], None] | None = None,
    ) -> None:
        self._options = startup.compiler_options(devices)
        self._futures: dict[str, Future[Program]] = {}
        self._on_compiled = on_compiled
        # One thread: programs come in the order they are asked for, and leave cores to training.
        self._executor = ThreadPoolExecutor(1, "compile") if background else None
        self._lock = threading.Lock()
        self._compilations = 0

    def __enter__(self) -> "Programs":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def compilations(self) -> int:
        """How many programs were compiled (or read from the compilation cache) so far."""
        return self._compilations

    def finished(self, name: str) -> Program | None:
        """Returns the program if it exists by now; does not wait."""
        future = self._futures.get(name)
        if future is None or not future.done() or future.cancelled() or future.exception():
            return None
        return future.result()

    def prepare(self, name: str, lower: Callable[[], jax.stages.Lowered]) -> None:
        """Starts compiling in the background, unless the program exists or is under way."""
        if self._executor is None:
            return
        with self._lock:
            if name not in self._futures:
                self._futures[name] = self._executor.submit(self._compile, name, lower)

    def get(self, name: str, lower: Callable[[], jax.stages.Lowered]) -> Program:
        """Returns the program: the finished one, the one under way, or a new one.

        Args:
            name: tells programs apart; the same name must always mean the same `lower`.
            lower: traces and lowers the function; called at most once per name.
        """
        with self._lock:
            future = self._futures.get(name)
            # One that waits behind others in the background is made here and now instead.
            mine = future is None or future.cancel()
            if mine:
                future = self._futures[name] = Future()
        if mine:
            try:
                future.set_result(self._compile(name, lower))
            except BaseException as error:
                future.set_exception(error)
        return future.result()

    def close(self) -> None:
        """Drops what waits and returns when the compilation under way is done.

        XLA cannot be interrupted, and a thread inside it must not outlive the interpreter.
        """
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def _compile(self, name: str, lower: Callable[[], jax.stages.Lowered]) -> Program:
        start = time.perf_counter()
        compiled = lower().compile(self._options)
        program = Program(name, compiled, time.perf_counter() - start, device_memory(compiled))
        startup.release_freed_memory()
        with self._lock:
            self._compilations += 1
        if self._on_compiled is not None:
            self._on_compiled(program)
        return program


class StepPrograms:
    """The train step's programs: one for each (image size, batch size) of a run's stages.

    Args:
        programs: where they are compiled and kept.
        step: pure function (state, batch, knobs) -> (state, metrics). The state is donated: its
            buffers become those of the new state.
        state: (image size in px, global batch size) -> shapes, dtypes and shardings of the state.
        batch: the same of the batch.
        knobs: shapes of the traced values that change with the stage.
    """

    def __init__(
        self,
        programs: Programs,
        step: Callable[..., Any],
        *,
        state: Callable[[int, int], Any],
        batch: Callable[[int, int], Any],
        knobs: Any,
    ) -> None:
        self._programs = programs
        self._jitted = jax.jit(step, donate_argnums=0)
        self._state, self._batch, self._knobs = state, batch, _shapes(knobs)

    def prepare(self, image_size: int, batch_size: int) -> None:
        """Starts compiling in the background, unless done or under way."""
        self._programs.prepare(_name(image_size, batch_size), self._lower(image_size, batch_size))

    def get(self, image_size: int, batch_size: int) -> Program:
        """Returns the program, compiling it now if it was not prepared."""
        return self._programs.get(
            _name(image_size, batch_size), self._lower(image_size, batch_size)
        )

    def finished(self, image_size: int, batch_size: int) -> Program | None:
        """Returns the program if it exists by now; does not wait."""
        return self._programs.finished(_name(image_size, batch_size))

    def _lower(self, image_size: int, batch_size: int) -> Callable[[], jax.stages.Lowered]:
        return lambda: self._jitted.lower(
            self._state(image_size, batch_size), self._batch(image_size, batch_size), self._knobs
        )


def scaled_memory(known: int, *, fixed: int, pixels: float) -> int:
    """Estimates a program's memory from that of another image size or batch size.

    Activations grow with the number of pixels in the batch, the state does not.

    Args:
        known: bytes of the program that was compiled.
        fixed: bytes of the state on each device, part of `known`.
        pixels: batch_size * image_size^2 of the wanted program, divided by that of the known one.
    """
    fixed = min(fixed, known)
    return int(fixed + (known - fixed) * pixels)


def device_bytes(tree: Any) -> int:
    """Returns the bytes of a pytree of arrays (or shapes) on each device that holds it."""

    def size(leaf: Any) -> int:
        sharding = getattr(leaf, "sharding", None)
        shape = sharding.shard_shape(leaf.shape) if sharding is not None else leaf.shape
        count = 1
        for length in shape:
            count *= length
        return count * leaf.dtype.itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))


def _name(image_size: int, batch_size: int) -> str:
    return f"train step, {image_size} px, batch {batch_size}"


def _shapes(tree: Any) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )


def device_memory(compiled: jax.stages.Compiled) -> int | None:
    """Bytes that a program needs on each device, as the compiler planned; None: it does not say."""
    stats = compiled.memory_analysis()
    if stats is None:
        return None
    return int(
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
    )
