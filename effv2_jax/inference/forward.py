"""Compiled programs over batches of one shape, spread over all local devices."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from effv2_jax import startup
from effv2_jax.data.kinds import Kind
from effv2_jax.models.infer import infer, round_kernels
from effv2_jax.models.network import EfficientNet

_AXIS = "data"


class BatchProgram:
    """A function of variables and a batch; each device computes its rows of the batch.

    Args:
        function: (variables, *arrays) -> outputs. The first axis of all arrays and outputs is the
            example, and no example depends on another.
        variables: pytree of arrays.
        batch_size: wanted; see the attribute.

    Attributes:
        batch_size: examples of every call: as wanted, raised to a multiple of the devices.
    """

    def __init__(
        self, function: Callable[..., Any], variables: Mapping[str, Any], *, batch_size: int
    ) -> None:
        devices = jax.local_devices()[:batch_size]
        self.batch_size = -(-batch_size // len(devices)) * len(devices)
        mesh = Mesh(np.asarray(devices), (_AXIS,))
        everywhere, split = PartitionSpec(), PartitionSpec(_AXIS)
        self._split = NamedSharding(mesh, split)
        self._variables = jax.device_put(dict(variables), NamedSharding(mesh, everywhere))

        def on_device(variables: Mapping[str, Any], arrays: tuple) -> Any:
            return function(variables, *arrays)

        self._run = jax.jit(
            jax.shard_map(
                on_device,
                mesh=mesh,
                in_specs=(everywhere, split),
                out_specs=split,
                check_vma=False,
            ),
            compiler_options=startup.compiler_options(len(devices)),
        )

    def __call__(self, *arrays: np.ndarray) -> Any:
        """Returns the outputs for arrays of `batch_size` rows; does not wait for them."""
        return self._run(self._variables, jax.device_put(arrays, self._split))


def forward(
    model: EfficientNet, variables: Mapping[str, Any], *, kind: Kind, batch_size: int
) -> BatchProgram:
    """Makes the program images -> outputs of a network in inference mode.

    Args:
        model: the network; with num_classes=0 its outputs are the pooled features.
        variables: {"params", "batch_stats"} of it.
        kind: of preprocessing: its normalisation is part of the program.
        batch_size: see `BatchProgram`.

    Returns:
        A program of images [batch size, S, S, 3] in 0..255, not normalised.
    """

    def apply(variables: Mapping[str, Any], images: jax.Array) -> jax.Array:
        return infer(model, variables, normalize(images, kind))

    return BatchProgram(apply, round_kernels(model, variables), batch_size=batch_size)


def normalize(images: jax.Array, kind: Kind) -> jax.Array:
    """Returns (images - mean) / std, float32; images in 0..255."""
    mean, std = jnp.asarray(kind.mean, jnp.float32), jnp.asarray(kind.std, jnp.float32)
    return (images - mean) / std
