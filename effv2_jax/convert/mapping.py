"""From the tensors of another framework to our variables and back: one table, one to one.

A table is a sequence of `TensorName`, made by names_*.py for a network. Every tensor of the source
is one variable of ours under another name, some with their axes in another order.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from effv2_jax.convert.comparison import (
    count_not_finite,
    differences,
    expected,
    nest,
    tell_not_finite,
)
from effv2_jax.errors import UserError
from effv2_jax.models.network import EfficientNet

Transform = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class TensorName:
    """One variable under both names.

    Attributes:
      path: ours, "params/..." or "batch_stats/...".
      theirs: the source's.
      transform: key of `TRANSFORMS`.
    """

    path: str
    theirs: str
    transform: str = "same"


def _axes(*order: int) -> Transform:
    return lambda tensor: tensor.transpose(order)


# name -> (source to ours, ours to source). k: kernel, I: input, O: output, C: channels.
TRANSFORMS: dict[str, tuple[Transform, Transform]] = {
    "same": (lambda tensor: tensor, lambda tensor: tensor),
    "depthwise_tf": (_axes(0, 1, 3, 2), _axes(0, 1, 3, 2)),  # [k, k, C, 1] and [k, k, 1, C]
    "conv_torch": (_axes(2, 3, 1, 0), _axes(3, 2, 0, 1)),  # [O, I, k, k] and [k, k, I, O]
    "depthwise_torch": (_axes(2, 3, 1, 0), _axes(3, 2, 0, 1)),  # [C, 1, k, k] and [k, k, 1, C]
    "linear_torch": (_axes(1, 0), _axes(1, 0)),  # [O, I] and [I, O]
}


def to_variables(
    tensors: Mapping[str, np.ndarray],
    names: Sequence[TensorName],
    model: EfficientNet,
    *,
    where: str,
) -> dict[str, dict]:
    """Turns the tensors of another framework into the variables of a network.

    Args:
      tensors: by the source's names; exactly those of `names`. A mapping that reads a tensor when
        it is asked for keeps one tensor more than the result in memory.
      names: the table of the network.
      model: the network.
      where: the file, for messages.

    Returns:
      {"params": ..., "batch_stats": ...} of NumPy arrays.

    Raises:
      UserError: tensors are missing, unknown, of another shape or type, or not finite; all are
        named, under the source's names and with its order of axes.
    """
    wanted = expected_there(names, model)
    by_source = {name.theirs: name for name in names}
    found, counts, arranged = {}, {}, {}
    for key in tensors:
        tensor = tensors[key]
        found[key] = (str(tensor.dtype), tensor.shape)
        if key in wanted and np.issubdtype(tensor.dtype, np.floating):
            counts[key] = count_not_finite(tensor)
        if found[key] == wanted.get(key):
            to_ours, _ = TRANSFORMS[by_source[key].transform]
            arranged[by_source[key].path] = np.ascontiguousarray(to_ours(tensor))
    problems = differences(found, wanted)
    problems += tell_not_finite(counts)
    if problems:
        raise UserError(f"{where}: not the weights of {model.variant}: {'; '.join(problems)}")
    return nest(arranged)


def from_variables(
    variables: Mapping[str, Any], names: Sequence[TensorName]
) -> dict[str, np.ndarray]:
    """Turns our variables into the source's tensors, in the order of the table; exact."""
    out = {}
    for name in names:
        value = variables
        for folder in name.path.split("/"):
            value = value[folder]
        _, to_theirs = TRANSFORMS[name.transform]
        out[name.theirs] = np.ascontiguousarray(to_theirs(np.asarray(value)))
    return out


def arrange(tensors: Mapping[str, np.ndarray], names: Sequence[TensorName]) -> dict[str, dict]:
    """Like `to_variables`, of any part of a network and unchecked."""
    return nest(
        {name.path: TRANSFORMS[name.transform][0](np.asarray(tensors[name.theirs]))
         for name in names}
    )  # fmt: skip


def expected_there(
    names: Sequence[TensorName], model: EfficientNet
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of the source's tensors of a network, by the source's names."""
    ours = expected(model)
    if {name.path for name in names} != set(ours) or len({n.theirs for n in names}) != len(ours):
        raise ValueError(f"the table is not one to one with the variables of {model.variant}")
    out = {}
    for name in names:
        dtype, shape = ours[name.path]
        _, to_theirs = TRANSFORMS[name.transform]
        out[name.theirs] = (dtype, to_theirs(np.broadcast_to(np.float32(0), shape)).shape)
    return out
