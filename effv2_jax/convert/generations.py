"""Whose tensor is which in a TensorFlow checkpoint, of any of the generations of official ones.

* Name-based: "efficientnetv2-s/blocks_3/conv2d/kernel", with any name of the model in front or
  none; with moving averages beside the variables ("<variable>/ExponentialMovingAverage"), or only
  these; with the slots of optimizers ("<variable>/RMSProp_1") and global counters.
* A fresh TF1 graph numbers the head's second scope ("head_1/dense"), a second model in one process
  all ("stem_1", "head/dense_1").
* Object-based, see `object_graph`.

Everything is put in a drawer; what fits none is unknown, which is an error later on.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable

from effv2_jax.convert import object_graph
from effv2_jax.convert.names_tf import object_paths
from effv2_jax.convert.object_graph import GRAPH_KEY
from effv2_jax.errors import UserError

_AVERAGE = "ExponentialMovingAverage"
# tf.compat.v1's optimizers name their slots after themselves and number the second and third.
_SLOT = re.compile(
    r"(RMSProp|Momentum|Adam|AdamW|LAMB|LARS|Adagrad|Adadelta|Ftrl|GradientDescent)(Optimizer)?(_\d)?"
)
_COUNTERS = ("global_step", "beta1_power", "beta2_power")
_VARIABLE = re.compile(r"(?:(?P<prefix>.+?)/)?(?P<part>stem|head|blocks_\d+)(?:_\d+)?/(?P<rest>.+)")
# Attributes of the object that is saved which hold no variables of the network.
_TRAINING = ("optimizer", "_optimizer", "save_counter", "keras_api", "step", "global_step")

SLOTS, COUNTERS, TRAINING, GRAPH = (
    "optimizer slots", "step counters", "training state", "object graph"
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contents:
    """The tensors of a checkpoint, by what they are.

    Attributes:
      raw: official name without the model's -> name in the checkpoint.
      average: the same of the moving averages.
      left_out: kind -> how many tensors are no variables of a network.
      unknown: names in the checkpoint that fit nothing.
      prefix: what stood before the official names, "" if nothing.
    """

    raw: dict[str, str]
    average: dict[str, str]
    left_out: dict[str, int]
    unknown: tuple[str, ...]
    prefix: str


def by_name(keys: Iterable[str], *, where: str) -> Contents:
    """Sorts the tensors of a name-based checkpoint.

    Args:
        keys: names in the checkpoint.
        where: the checkpoint, for messages.

    Raises:
        UserError: it holds two networks, or two tensors for one variable.
    """
    raw: dict[str, str] = {}
    average: dict[str, str] = {}
    left_out: Counter[str] = Counter()
    unknown, slots, prefixes, twice = [], [], {}, []
    for key in sorted(keys):
        parent, _, last = key.rpartition("/")
        if last in _COUNTERS:
            left_out[COUNTERS] += 1
            continue
        if _SLOT.fullmatch(last):
            slots.append((key, parent))
            continue
        official, prefix = _official(parent if last == _AVERAGE else key)
        if official is None:
            unknown.append(key)
            continue
        prefixes.setdefault(prefix, key)
        drawer = average if last == _AVERAGE else raw
        if official in drawer:
            twice.append(f"{drawer[official]} and {key}")
        drawer[official] = key
    if len(prefixes) > 1:
        raise UserError(
            f"{where}: {len(prefixes)} networks in one checkpoint: {', '.join(prefixes.values())}; "
            "expected one"
        )
    if twice:
        raise UserError(f"{where}: two tensors for one variable: {', '.join(twice)}")
    for key, parent in slots:
        if _official(parent)[0] in (raw if raw else average):
            left_out[SLOTS] += 1
        else:
            unknown.append(key)
    return Contents(
        raw=raw, average=average, left_out=dict(left_out), unknown=tuple(unknown),
        prefix=next(iter(prefixes), ""),
    )  # fmt: skip


def by_object(keys: Iterable[str], graph: bytes, *, where: str) -> Contents:
    """Sorts the tensors of an object-based checkpoint.

    Args:
        keys: names in the checkpoint.
        graph: the tensor `GRAPH_KEY`.
        where: the checkpoint, for messages.

    Raises:
        UserError: the graph is damaged or holds no network.
    """
    try:
        nodes = object_graph.parse(graph)
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: damaged: the graph of its objects: {error}") from None
    start = object_graph.find_network(nodes, ("_stem", "_blocks", "_head"))
    if start is None:
        raise UserError(
            f"{where}: an object-based checkpoint without an official network: no object in it has "
            "_stem, _blocks and _head"
        )
    blocks = nodes[nodes[start].children["_blocks"]].children
    held = [nodes[blocks[i]].children for i in sorted(blocks, key=_as_number) if i.isdigit()]
    paths = object_paths(held)
    raw = {official: object_graph.key_at(nodes, start, path) for path, official in paths.items()}
    raw = {official: key for official, key in raw.items() if key is not None}
    slots = object_graph.slot_keys(nodes)
    first = object_graph.first_attributes(nodes)
    left_out: Counter[str] = Counter()
    unknown = []
    for key in sorted(set(keys) - set(raw.values())):
        if key == GRAPH_KEY:
            left_out[GRAPH] += 1
        elif key in slots:
            left_out[SLOTS] += 1
        elif first.get(key) in _TRAINING:
            left_out[TRAINING] += 1
        else:
            unknown.append(key)
    return Contents(raw=raw, average={}, left_out=dict(left_out), unknown=tuple(unknown), prefix="")


def _as_number(attribute: str) -> int:
    return int(attribute) if attribute.isdigit() else -1


def _official(key: str) -> tuple[str | None, str]:
    """Returns the official name without the model's, and what stood before it; None: not one."""
    match = _VARIABLE.fullmatch(key)
    if match is None:
        return None, ""
    rest = re.sub(r"^dense_\d+/", "dense/", match["rest"])
    return f"{match['part']}/{rest}", match["prefix"] or ""
