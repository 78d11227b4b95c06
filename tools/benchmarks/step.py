"""Measures the training step and the evaluation step: `python tools/benchmark.py step --help`.

The programs are those of a run (`training/step.py`), compiled ahead for the data mesh. Images and
labels are random and valid. Variants of one model are measured in turns, so that whatever else
the machine does falls on all of them alike; the median of the rounds is given with their range.
"""

import argparse
import dataclasses
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effv2_jax import startup
from effv2_jax.command import Parser
from effv2_jax.errors import UserError

if TYPE_CHECKING:
    import jax

# A training step multiplies about three times as much as a forward pass: the values, and the
# gradients with respect to inputs and to weights.
_TRAINING_FACTOR = 3

_DTYPES = ("float32", "bfloat16")
_LOWERINGS = ("auto", "plain", "cpu")
_MODES = ("train", "infer")
_NUM_CLASSES = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured together; the variants of a case differ in `lowering` only."""

    model: str
    image_size: int
    batch: int
    dtype: str


@dataclasses.dataclass(kw_only=True)
class Variant:
    """A compiled program and the rounds measured with it.

    Attributes:
        case: what it belongs to.
        mode: train or infer.
        lowering: see `effv2_jax.models.lowering`.
        run: makes one step and returns the arrays to wait for.
        compile_seconds: tracing, lowering and compiling, or reading from the cache.
        memory: bytes per device, None where the backend does not say.
        rounds: (wall seconds, processor seconds) per step, of every round.
    """

    case: Case
    mode: str
    lowering: str
    run: Callable[[], Any]
    compile_seconds: float
    memory: int | None
    rounds: list[tuple[float, float]] = dataclasses.field(default_factory=list)

    def measure(self, steps: int) -> None:
        """Adds one round of `steps` steps."""
        import jax

        wall, processor = time.perf_counter(), time.process_time()
        for _ in range(steps):
            waiting = self.run()
        jax.block_until_ready(waiting)
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        self.rounds.append((wall / steps, processor / steps))

    def result(self, peak: float) -> dict[str, Any]:
        """Returns what was measured as a JSON object; `peak` in multiply-adds per second."""
        from effv2_jax.models.summary import summarize
        from effv2_jax.models.variants import get_variant

        rows = summarize(get_variant(self.case.model), image_size=self.case.image_size)
        work = sum(row.multiply_adds for row in rows)
        if self.mode == "train":
            work *= _TRAINING_FACTOR
        rates = sorted(self.case.batch / wall for wall, _ in self.rounds)
        median = statistics.median(rates)
        return {
            **dataclasses.asdict(self.case),
            "mode": self.mode,
            "lowering": self.lowering,
            "images_per_second": median,
            "range": [rates[0], rates[-1]],
            "rounds": [self.case.batch / wall for wall, _ in self.rounds],
            "step_ms": self.case.batch / median * 1e3,
            "processor_ms_per_image": 1e3
            * statistics.median(cpu / self.case.batch for _, cpu in self.rounds),
            "cores_busy": statistics.median(cpu / wall for wall, cpu in self.rounds),
            "compile_seconds": self.compile_seconds,
            "memory_bytes": self.memory,
            "multiply_adds_per_image": work,
            "share_of_peak": median * work / peak,
        }


def run(arguments: Sequence[str]) -> None:
    """Measures and prints.

    Raises:
        UserError: arguments that are wrong; nothing was measured.
    """
    flags = _parse(arguments)
    cases = list(_cases(flags))
    tuning = startup.tune(sys.argv, enabled=not flags.no_tune)

    from effv2_jax.training import mesh as meshes

    startup.enable_compilation_cache("auto" if flags.cache else "none")
    mesh = meshes.make_mesh(flags.devices)
    for case in cases:
        meshes.check_batch("--batch", case.batch, mesh)
    environment = _environment(tuning, mesh.size)
    peaks = {dtype: _matmul_peak(mesh, dtype) for dtype in flags.dtype}
    environment["matmul_peak_gflops"] = {dtype: 2e-9 * peak for dtype, peak in peaks.items()}
    _print_environment(environment)

    results = []
    for case in cases:
        variants = [
            _prepare(case, mode, lowering, mesh=mesh, recipe=flags.recipe)
            for mode, lowering in itertools.product(flags.mode, flags.lowering)
        ]
        for variant in variants:
            variant.measure(1)  # the first steps touch memory for the first time
            variant.rounds.clear()
        for _ in range(flags.rounds):
            for variant in variants:
                variant.measure(flags.steps)
        of_case = [variant.result(peaks[case.dtype]) for variant in variants]
        _print_case(case, of_case)
        results += of_case
        _write(flags.json, {"environment": environment, "results": results})


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the flags; lists are separated by commas."""
    parser = Parser(__doc__.splitlines()[0], prog="tools/benchmark.py step")

    def add_list(flag: str, default: str, kind: type = str, *, text: str) -> None:
        def read(value: str) -> list[Any]:
            return [kind(part) for part in value.split(",")]

        read.__name__ = f"list of {kind.__name__}"  # argparse names it in its message
        parser.add_argument(flag, default=read(default), type=read, help=f"{text} ({default})")

    add_list("--model", "efficientnetv2-b0", text="names of models")
    add_list("--image-size", "192", int, text="pixels")
    add_list("--batch", "8", int, text="global batch sizes")
    add_list("--dtype", "float32", text=" or ".join(_DTYPES))
    add_list("--lowering", "auto", text=f"compared in turns: {', '.join(_LOWERINGS)}")
    add_list("--mode", "train,infer", text="which steps")
    add = parser.add_argument
    add("--recipe", choices=("plain", "official"), default="plain", help="plain: SGD and no more")
    add("--devices", type=int, default=0, help="of the data mesh; 0: all")
    add("--steps", type=int, default=5, help="per round")
    add("--rounds", type=int, default=5, help="in turns over the variants")
    add("--json", type=Path, default=None, metavar="FILE", help="write all numbers there")
    add("--cache", action="store_true", help="use the compilation cache of the commands")
    add("--no-tune", action="store_true", help="leave allocator and XLA flags as they are")
    return parser.parse_args(arguments)


def _cases(flags: argparse.Namespace) -> Iterator[Case]:
    """Checks the flags and yields what to measure; needs no JAX."""
    from effv2_jax.models.variants import get_variant

    for flag, values, allowed in (
        ("--dtype", flags.dtype, _DTYPES),
        ("--lowering", flags.lowering, _LOWERINGS),
        ("--mode", flags.mode, _MODES),
    ):
        for value in values:
            if value not in allowed:
                raise UserError(f"{flag}: {value!r}; expected {', '.join(allowed)}")
    for flag, values in (
        ("--image-size", flags.image_size),
        ("--batch", flags.batch),
        ("--steps", [flags.steps]),
        ("--rounds", [flags.rounds]),
    ):
        if min(values) < 1:
            raise UserError(f"{flag} is {min(values)}; expected at least 1")
    if flags.devices < 0:
        raise UserError(f"--devices is {flags.devices}; expected 0 (all) or more")
    for name in flags.model:
        get_variant(name)
    if flags.json is not None and not flags.json.absolute().parent.is_dir():
        raise UserError(f"--json: the folder of {flags.json} does not exist")
    for name, size, batch, dtype in itertools.product(
        flags.model, flags.image_size, flags.batch, flags.dtype
    ):
        yield Case(model=name, image_size=size, batch=batch, dtype=dtype)


def _prepare(
    case: Case, mode: str, lowering: str, *, mesh: "jax.sharding.Mesh", recipe: str
) -> Variant:
    """Compiles a program and makes the arrays it runs on."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from effv2_jax.models.network import create_model, init_variables
    from effv2_jax.training import compile as programs
    from effv2_jax.training import mesh as meshes
    from effv2_jax.training.progressive import Stage
    from effv2_jax.training.step import (
        create_state,
        make_eval_step,
        make_train_step,
        stage_knobs,
    )

    overrides = {"dropout_rate": 0.0, "survival_prob": 1.0} if recipe == "plain" else {}
    model = create_model(
        case.model,
        _NUM_CLASSES,
        dtype=jnp.dtype(case.dtype),
        lowering=lowering,
        axis_name=meshes.AXIS,
        **overrides,
    )
    variables = init_variables(create_model(case.model, _NUM_CLASSES), 0)
    how = _recipe(recipe)
    rng = np.random.default_rng(0)
    shape = (case.batch, case.image_size, case.image_size, 3)
    batch = {
        "image": rng.integers(0, 256, shape, dtype=np.uint8),
        "label": rng.integers(0, _NUM_CLASSES, case.batch, dtype=np.int32),
    }
    if mode == "infer":
        batch["mask"] = np.ones(case.batch, np.float32)
    batch = jax.device_put(batch, meshes.batch_sharding(mesh))
    replicated = meshes.replicated(mesh)
    compiler = programs.Programs(background=False)

    if mode == "infer":
        arguments = (jax.device_put(variables, replicated), batch)
        step = jax.jit(make_eval_step(model, how, mesh=mesh))
        program = compiler.get(mode, lambda: step.lower(*arguments))

        def run() -> Any:
            return program.run(*arguments)

    else:
        stage = Stage(
            index=0,
            image_size=case.image_size,
            batch_size=case.batch,
            start_step=0,
            end_step=10**6,
            first_example=0,
            epochs=1.0,
            magnitude=15.0,
            dropout_rate=float(model.dropout_rate),
            mixup_alpha=0.0,
            cutmix_alpha=0.0,
            schedule_start=0.0,
            schedule_scale=1.0,
            lr_scale=1.0,
        )
        knobs = jax.device_put(stage_knobs(stage, how, seed=0), replicated)
        state = jax.device_put(create_state(how, variables), replicated)
        step = jax.jit(make_train_step(model, how, mesh=mesh), donate_argnums=0)
        program = compiler.get(mode, lambda: step.lower(state, batch, knobs))

        def run() -> Any:
            nonlocal state
            state, metrics = program.run(state, batch, knobs)
            return state, metrics

    return Variant(
        case=case,
        mode=mode,
        lowering=lowering,
        run=run,
        compile_seconds=program.seconds,
        memory=program.memory,
    )


def _recipe(name: str) -> Any:
    """The recipe `name`: "plain" is SGD alone, "official" what ImageNet is trained with."""
    from effv2_jax.data.policy import make_policy
    from effv2_jax.training.recipe import Images, Recipe
    from effv2_jax.training.schedules import make_schedule

    schedule = make_schedule("constant", 1e-3, total_steps=1e6)
    common = {"num_classes": _NUM_CLASSES, "schedule": schedule, "total_steps": 1e6}
    if name == "plain":
        return Recipe(optimizer="sgd", **common)
    return Recipe(
        optimizer="rmsprop",
        label_smoothing=0.1,
        weight_decay=1e-5,
        ema_decay=0.9999,
        images=Images(flip=True, policy=make_policy("randaugment", layers=2)),
        **common,
    )


def _matmul_peak(mesh: "jax.sharding.Mesh", dtype: str) -> float:
    """Measures multiply-adds per second of a matrix product on all devices of the mesh at once."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    on_cpu = jax.default_backend() == "cpu"
    side = 1024 if on_cpu else 8192
    parts = PartitionSpec("data")
    shape = (mesh.size, side, side)
    a = jax.device_put(jnp.ones(shape, dtype) / side, NamedSharding(mesh, parts))
    product = jax.jit(
        jax.shard_map(lambda x: x @ x, mesh=mesh, in_specs=parts, out_specs=parts, check_vma=False)
    )
    jax.block_until_ready(product(a))
    times = []
    for _ in range(20):
        start = time.perf_counter()
        jax.block_until_ready(product(a))
        times.append(time.perf_counter() - start)
    return mesh.size * side**3 / min(times)


def _environment(tuning: str, devices: int) -> dict[str, Any]:
    """What the numbers depend on."""
    import jax
    import jaxlib

    variables = ("XLA_FLAGS", "LD_PRELOAD", "MALLOC_CONF", "GLIBC_TUNABLES", "JAX_PLATFORMS")
    return {
        "tuning": tuning.removeprefix("tuning: "),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": devices,
        "cores": startup.usable_cores(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "variables": {name: os.environ[name] for name in variables if name in os.environ},
    }


def _print_environment(environment: dict[str, Any]) -> None:
    peaks = ", ".join(
        f"{dtype} {value:,.0f} GFLOP/s"
        for dtype, value in environment["matmul_peak_gflops"].items()
    )
    print(
        f"{environment['devices']} x {environment['device']} ({environment['backend']}), "
        f"{environment['cores']} cores, load {environment['load']:.1f}; "
        f"jax {environment['jax']}, jaxlib {environment['jaxlib']}"
    )
    print(f"tuning: {environment['tuning']}")
    print(f"matrix product, measured: {peaks}", flush=True)


def _print_case(case: Case, results: Sequence[dict[str, Any]]) -> None:
    print(f"\n{case.model}, {case.image_size} px, batch {case.batch}, {case.dtype}")
    print(
        f"{'':<14}{'images/s':>10} {'(range)':<18}{'ms/step':>9}{'cpu ms/image':>14}"
        f"{'of peak':>9}{'memory':>11}{'compile':>10}"
    )
    for r in results:
        memory = "?" if r["memory_bytes"] is None else f"{r['memory_bytes'] / 2**20:,.0f} MiB"
        spread = "({:.1f} - {:.1f})".format(*r["range"])
        print(
            f"{r['mode'] + ' ' + r['lowering']:<14}{r['images_per_second']:>10.1f} {spread:<18}"
            f"{r['step_ms']:>9.1f}{r['processor_ms_per_image']:>14.2f}{r['share_of_peak']:>9.0%}"
            f"{memory:>11}{r['compile_seconds']:>8.1f} s",
            flush=True,
        )
    for mode in _MODES:
        of_mode = [r for r in results if r["mode"] == mode]
        for other in of_mode[1:]:
            # Neighbours in time, round by round: what disturbs one disturbs the other.
            pairs = zip(other["rounds"], of_mode[0]["rounds"], strict=True)
            ratios = [a / b for a, b in pairs]
            print(
                f"{mode}: {other['lowering']} / {of_mode[0]['lowering']} = "
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"
            )


def _write(path: Path | None, content: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(content, indent=1) + "\n")
