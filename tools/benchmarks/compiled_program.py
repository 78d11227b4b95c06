"""Counts what a compiled XLA program moves and starts, from its text.

The entry computation of a program for a GPU is a list of kernels: each reads its operands from
memory and writes its result. So the sum of those sizes is the traffic with memory that the
program asks for, known without running it. A kernel that reads only a part of an operand, or
finds it in the cache, moves less.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator

_ITEM_BYTES = {
    **dict.fromkeys(("pred", "s8", "u8"), 1),
    **dict.fromkeys(("s16", "u16", "f16", "bf16"), 2),
    **dict.fromkeys(("s32", "u32", "f32"), 4),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 8),
    "c128": 16,
}
# They move nothing, or their parts are counted instead.
_FREE = {
    *("tuple", "get-tuple-element", "parameter", "bitcast", "constant", "opt-barrier"),
    *("after-all", "partition-id", "replica-id"),
}
# Their bodies are instructions like those of the entry; a loop's body is counted once.
_CALLING = {"call", "while", "conditional"}
_COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")

_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%([\w.\-]+)"
)
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
# Words in the names that JAX gives to what it traces -> layer; the first that fits.
_LAYERS = (
    ("/se/", "squeeze-excite"),
    ("norm", "norm and activation"),
    ("silu", "norm and activation"),
    ("conv", "around convolutions"),
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a computation.

    Attributes:
        name: its own.
        opcode: fusion, custom-call, copy, ...
        result: its type as text, with shapes.
        operands: names.
        called: names of the computations it runs.
        target: of a custom call, else "".
        op_name: what it was traced from, as JAX names it.
    """

    name: str
    opcode: str
    result: str
    operands: tuple[str, ...]
    called: tuple[str, ...]
    target: str
    op_name: str

    @property
    def kind(self) -> str:
        """The kind of kernel, for people."""
        if self.opcode.startswith(_COLLECTIVES):
            return "collective"
        if self.opcode == "custom-call":
            if self.target.startswith("__cudnn"):
                return "cuDNN"
            if self.target.endswith("triton"):
                return "Pallas"
            return "matrix product" if "gemm" in self.target or "matmul" in self.target else "other"
        return self.opcode if self.opcode in ("fusion", "copy", "convolution") else "other"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """What a program does in one step on one device.

    Attributes:
        bytes: operands and results of all kernels.
        kernels: kind -> number.
        parts: part of the step -> bytes.
        collectives: number of messages between devices.
        collective_bytes: their results.
        transposes: of arrays with more than `large` elements: activations, if `large` is the size
            of the largest parameter.
        small_transposes: all others.
        loops: whose bodies were counted once.
        heaviest: (bytes, kind, name, what it was traced from) of every kernel, largest first.
    """

    bytes: int
    kernels: dict[str, int]
    parts: dict[str, int]
    collectives: int
    collective_bytes: int
    transposes: int
    small_transposes: int
    loops: int
    heaviest: list[tuple[int, str, str, str]]


def count(text: str, *, large: int) -> Counts:
    """Counts a program.

    Args:
        text: of `jax.stages.Compiled.as_text()`.
        large: see `Counts.transposes`.
    """
    computations, entry = _read(text)
    kernels, parts, heaviest = Counter(), Counter(), []
    collective_bytes = 0
    for instruction, size in _kernels(computations, entry):
        kernels[instruction.kind] += 1
        parts[_part(instruction)] += size
        heaviest.append((size, instruction.kind, instruction.name, instruction.op_name))
        if instruction.kind == "collective":
            collective_bytes += _size(instruction.result)
    transposed = [
        _elements(instruction.result)
        for body in computations.values()
        for instruction in body.values()
        if instruction.opcode == "transpose"
    ]
    return Counts(
        bytes=sum(parts.values()),
        kernels=dict(kernels),
        parts=dict(parts.most_common()),
        collectives=kernels["collective"],
        collective_bytes=collective_bytes,
        transposes=sum(elements > large for elements in transposed),
        small_transposes=sum(elements <= large for elements in transposed),
        loops=sum(i.opcode == "while" for body in computations.values() for i in body.values()),
        heaviest=sorted(heaviest, reverse=True),
    )


def _read(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Returns the computations, name -> instructions by name, and the name of the entry."""
    computations, entry, body = {}, "", {}
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            body = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
            continue
        match = _INSTRUCTION.match(line)
        if match:
            body[match[1]] = _instruction(match[1], match[2])
    if not entry:
        raise ValueError("the text has no entry computation: not a compiled program")
    return computations, entry


def _instruction(name: str, text: str) -> Instruction:
    result, rest = _split_type(text)
    opcode, _, rest = rest.partition("(")
    operands, attributes = _split_parenthesis(rest)
    target, op_name = _TARGET.search(attributes), _OP_NAME.search(attributes)
    return Instruction(
        name=name,
        opcode=opcode.strip(),
        result=result,
        operands=tuple(_OPERAND.findall(operands)),
        called=tuple(_CALLED.findall(attributes)),
        target=target[1] if target else "",
        op_name=op_name[1] if op_name else "",
    )


def _split_type(text: str) -> tuple[str, str]:
    """Splits "TYPE opcode(...)": a tuple's type has spaces within its parentheses."""
    if text.startswith("("):
        inner, rest = _split_parenthesis(text[1:])
        return inner, rest
    result, _, rest = text.partition(" ")
    return result, rest


def _split_parenthesis(text: str) -> tuple[str, str]:
    """Splits behind the parenthesis that closes one opened before the text."""
    depth = 1
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[:place], text[place + 1 :]
    return text, ""


def _kernels(
    computations: dict[str, dict[str, Instruction]], name: str
) -> Iterator[tuple[Instruction, int]]:
    """Yields every kernel of a computation, and of those it calls, with its bytes."""
    body = computations[name]
    for instruction in body.values():
        if instruction.opcode in _CALLING:
            for called in instruction.called:
                yield from _kernels(computations, called)
        elif instruction.opcode not in _FREE and not instruction.opcode.endswith("-done"):
            read = sum(_size(body[operand].result) for operand in instruction.operands)
            yield instruction, read + _size(instruction.result)


def _size(shapes: str) -> int:
    """Bytes of all arrays in the text of a type."""
    return sum(
        _ITEM_BYTES.get(kind, 0) * math.prod(int(n) for n in dimensions.split(",") if n)
        for kind, dimensions in _SHAPE.findall(shapes)
    )


def _elements(shapes: str) -> int:
    return sum(
        math.prod(int(n) for n in dimensions.split(",") if n)
        for _, dimensions in _SHAPE.findall(shapes)
    )


def _part(instruction: Instruction) -> str:
    """The part of the step that a kernel belongs to: a pass of a layer, as far as names tell.

    A fusion carries the name of its last operation alone, so what stands at the border of two
    layers may be counted for either.
    """
    if instruction.kind == "collective":
        return "collectives"
    name = instruction.op_name
    backward = "transpose(jvp(" in name
    if instruction.kind in ("cuDNN", "convolution"):
        if "BackwardFilter" in instruction.target:
            return "convolution, gradient of the kernel"
        # At stride 1 the gradient of the input is a forward convolution too.
        return f"convolution, {'gradient of the input' if backward else 'forward'}"
    if "jvp(" not in name:
        return "images, optimizer and the rest"
    layers = (layer for word, layer in _LAYERS if word in name)
    layer = next(layers, "residuals and the rest")
    return f"{layer}, {'backward' if backward else 'forward'}"
