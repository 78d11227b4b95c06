"""The graph of objects in a checkpoint written by Keras' `save_weights` or `tf.train.Checkpoint`.

Such a checkpoint names tensors by a path of Python attributes from some object on, and keeps the
graph of all objects as one more tensor. A variable is found by walking the attributes, whichever of
its paths TensorFlow chose as its name.

Follows tensorflow/core/protobuf/trackable_object_graph.proto.
"""

import dataclasses
from collections.abc import Iterator, Sequence

from effv2_jax.convert.wire import fields, message, number

GRAPH_KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"


@dataclasses.dataclass(frozen=True)
class Node:
    """An object.

    Attributes:
      children: attribute -> index of the node.
      keys: names of the tensors that hold its value.
      slots: indices of the nodes that an optimizer keeps for some variable.
    """

    children: dict[str, int]
    keys: tuple[str, ...]
    slots: tuple[int, ...]


def parse(data: bytes) -> list[Node]:
    """Reads a TrackableObjectGraph: nodes = 1; the first one is the root.

    Raises:
        ValueError: damaged.
    """
    nodes = [_parse_node(message(value)) for field, value in fields(data) if field == 1]
    for node in nodes:
        if any(index >= len(nodes) for index in (*node.children.values(), *node.slots)):
            raise ValueError("an object refers to one that is not there")
    return nodes


def slot_keys(nodes: Sequence[Node]) -> set[str]:
    """Names of the tensors that belong to optimizers' slots."""
    return {key for node in nodes for slot in node.slots for key in nodes[slot].keys}


def find_network(nodes: Sequence[Node], attributes: Sequence[str]) -> int | None:
    """Index of the node nearest to the root that has all these attributes, or None."""
    for index, _ in _walk(nodes):
        if set(attributes) <= set(nodes[index].children):
            return index
    return None


def first_attributes(nodes: Sequence[Node]) -> dict[str, str]:
    """Name of a tensor -> attribute of the root under which it is found on the shortest path."""
    return {key: path[0] for index, path in _walk(nodes) if path for key in nodes[index].keys}


def key_at(nodes: Sequence[Node], start: int, path: str) -> str | None:
    """Name of the tensor of the variable at a path "_blocks/3/_expand_conv/kernel", or None."""
    index = start
    for attribute in path.split("/"):
        if attribute not in nodes[index].children:
            return None
        index = nodes[index].children[attribute]
    keys = nodes[index].keys
    return keys[0] if len(keys) == 1 else None


def _walk(nodes: Sequence[Node]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yields (index, path of attributes) of what the root reaches, nearest first, once each."""
    seen, waiting = {0}, [(0, ())]
    while waiting and nodes:
        following = []
        for index, path in waiting:
            yield index, path
            for attribute, child in nodes[index].children.items():
                if child not in seen:
                    seen.add(child)
                    following.append((child, (*path, attribute)))
        waiting = following


def _parse_node(data: bytes) -> Node:
    """TrackableObject: children = 1 {node_id = 1, local_name = 2}, attributes = 2
    {checkpoint_key = 3}, slot_variables = 3 {slot_variable_node_id = 3}.
    """
    children, keys, slots = {}, [], []
    for field, value in fields(data):
        if field not in (1, 2, 3):
            continue
        inner = dict(fields(message(value)))
        if field == 1:
            children[message(inner.get(2, b"")).decode()] = number(inner.get(1, 0))
        elif field == 2:
            keys.append(message(inner.get(3, b"")).decode())
        else:
            slots.append(number(inner.get(3, 0)))
    return Node(children, tuple(keys), tuple(slots))
