"""Which layer every kernel of a compiled step belongs to, and how long the kernels take.

XLA writes into its programs from which operation of the network an instruction came; a profile of a
few steps has the time of each.
"""

import collections
import dataclasses
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# Layer, part and pass that a kernel belongs to.
Owner = tuple[str, str, str]

_NETWORK = re.compile(r"EfficientNet\)*/(.+)")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(\S+) = ")
_OPERATION = re.compile(r'op_name="([^"]*)"')
_OPERAND = re.compile(r"%([\w.\-]+)")
_PRODUCT = re.compile(r" (?:convolution|dot)\(")
_CALLED = re.compile(r"calls=%?([\w.\-]+)")
_LOOP = re.compile(r" while\(.*body=%?([\w.\-]+)")
_ACTIVATION = re.compile("silu|swish|relu|gelu|mish")
# The module of a segment: "se" of "transpose(jvp(se.factor))".
_MODULE = re.compile(r"(?:(?:jvp|transpose)\()*(\w*)")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")


def profile(
    program: Any,
    run: Callable[[int], None],
    *,
    steps: int,
    devices: int,
    blocks: Sequence[Any],
) -> dict[str, Any]:
    """Traces steps and adds up the times of their kernels.

    Args:
        program: compiled.
        run: makes so many steps and waits.
        steps: how many.
        devices: how many of them run the program.
        blocks: the network's `BlockSpec`s.

    Returns:
        "wall_ms" of a step while traced, and "kernels": [layer, part, pass, ms a step on a device].
    """
    import jax

    owners = owners_of(program.as_text(), blocks)
    # The text takes a piece of the memory that the last step freed: the next one touches new pages.
    run(1)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            start = time.perf_counter()
            run(steps)
            wall = time.perf_counter() - start
        (path,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
        sums: dict[Owner, float] = collections.defaultdict(float)
        for name, seconds in _events(data, on_host=jax.default_backend() == "cpu"):
            if name in owners:
                sums[owners[name]] += 1e3 * seconds / (steps * devices)
    return {
        "wall_ms": 1e3 * wall / steps,
        "kernels": [[*owner, milliseconds] for owner, milliseconds in sorted(sums.items())],
    }


def _events(data: Any, *, on_host: bool) -> Iterator[tuple[str, float]]:
    """The kernels of a profile: instruction, seconds."""
    for plane in data.planes:
        if not plane.name.startswith("/host:CPU" if on_host else "/device:"):
            continue
        lines = list(plane.lines)
        # On accelerators the same kernels are there once more by stream.
        for line in [line for line in lines if line.name == "XLA Ops"] or lines:
            for event in line.events:
                for key, value in event.stats:
                    if key == "hlo_op":
                        yield value, event.duration_ns / 1e9
                        break


@dataclasses.dataclass
class _Instruction:
    """A kernel or loop: its operation's name, what it calls, whose results it reads."""

    name: str
    called: str
    operands: list[str]
    is_loop: bool


def owners_of(text: str, blocks: Sequence[Any]) -> dict[str, Owner]:
    """Reads a compiled program: instruction of the main computation or its loops -> whose it is.

    A kernel with convolutions or products in it belongs to the first of them. What has no name, a
    copy that XLA made or a convolution that it turned around, belongs to what reads it.
    """
    main, products = _read(text)
    names: dict[str, str] = {}
    wanted: dict[str, str] = {}  # instruction -> name of the first in the network that reads it
    for key, instruction in reversed(main.items()):
        name = products.get(instruction.called) or instruction.name or wanted.get(key, "")
        names[key] = name
        if _NETWORK.search(name):
            for operand in instruction.operands:
                wanted[operand] = name
    # A loop's own time is that of the kernels in it.
    return {key: owner_of(names[key], blocks) for key in main if not main[key].is_loop}


def _read(text: str) -> tuple[dict[str, _Instruction], dict[str, str]]:
    """Returns the main computation with its loops, and of the others the name of the first product.

    Loops come after what they stand in.
    """
    computations: dict[str, dict[str, _Instruction]] = {}
    products: dict[str, str] = {}
    computation = entry = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            computation = header[2]
            entry = computation if header[1] else entry
            computations[computation] = {}
        elif found := _INSTRUCTION.match(line):
            operation = _OPERATION.search(line)
            name = operation[1] if operation else ""
            called, loop = _CALLED.search(line), _LOOP.search(line)
            body = (loop or called or ("", ""))[1]
            operands = _OPERAND.findall(line.partition(" = ")[2].partition("), ")[0])
            instruction = _Instruction(name, body, operands, is_loop=loop is not None)
            computations[computation][found[1]] = instruction
            if _PRODUCT.search(line) and name:
                products.setdefault(computation, name)
    main, waiting = {}, [entry]
    while waiting:
        instructions = computations[waiting.pop(0)]
        main |= instructions
        waiting += [one.called for one in instructions.values() if one.is_loop]
    return main, products


def owner_of(name: str, blocks: Sequence[Any]) -> Owner:
    """Returns whose an operation is, by its name: the path of the module that asked for it."""
    direction = "backward" if "transpose(" in name else "forward"
    match = _NETWORK.search(name)
    if match is None:
        return "rest", "update, loss, copies", direction
    outer, *path = match[1].split("/")
    if outer in ("stem", "head", "classifier"):
        return outer, _part(path) or "convolution", direction
    if not outer.startswith("blocks_"):
        return "head", "pooling", direction
    spec, part = blocks[int(outer.removeprefix("blocks_"))], _part(path) or "shortcut"
    gate = part == "squeeze-excite"
    modules = _modules(path)
    # A convolution can be applied inside the norm before it, which then stands first.
    module = next((name for name in reversed(modules) if name.endswith("_conv")), modules[0])
    if module.startswith("depthwise_") or (gate and not spec.fused):
        layer = "depthwise"
    elif spec.fused and (gate or module.startswith("expand_") or not spec.expands):
        layer = "dense"
    else:
        layer = "pointwise"
    return layer, part, direction


def _part(path: Sequence[str]) -> str | None:
    """What of a layer it is: gates, activations and convolutions can be applied inside a norm."""
    modules = _modules(path)
    if "se" in modules:
        return "squeeze-excite"
    if any(name == "conv" or name.endswith("_conv") for name in modules):
        return "convolution"
    if any(segment.startswith("jit(") and _ACTIVATION.search(segment) for segment in path):
        return "activation"
    if any(name == "norm" or name.endswith("_norm") for name in modules):
        return "norm"
    return None


def _modules(path: Sequence[str]) -> list[str]:
    return [_MODULE.match(segment)[1] for segment in path]
