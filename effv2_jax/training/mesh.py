"""The data mesh: which devices train, and how arrays lie on them.

One mesh axis, `data`: the examples of a global batch are split over it, everything else (state,
knobs) is held by every device, but what `channel_parallel.py` divides. `jax.jit` over a `Mesh` with
named shardings, not `pmap`, which is deprecated and hides the layout.
"""

import os
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from effv2_jax.errors import UserError

AXIS = "data"

# Where the launcher of several processes says how many there are.
_LAUNCHERS = {"srun": "SLURM_STEP_NUM_TASKS", "mpirun": "OMPI_COMM_WORLD_SIZE"}
_BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def join_processes(setting: str, environment: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes of the run; call before anything else asks JAX for devices.

    Every host of a pod runs the same command. The others are found by srun, mpirun, the metadata
    of Cloud TPUs (all by JAX itself), or by JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES
    and JAX_PROCESS_ID. Without a sign of any of these the process is alone.

    Args:
      setting: of runtime.distributed: "auto", or "off": alone whatever the environment says.
      environment: variables of the process.

    Raises:
      UserError: the signs are incomplete, or the others cannot be reached.
    """
    if setting == "off" or jax.distributed.is_initialized():
        return
    arguments = _by_hand(environment)
    launched = any(environment.get(name, "1") != "1" for name in _LAUNCHERS.values())
    pod = "," in environment.get("TPU_WORKER_HOSTNAMES", "")
    if not (arguments or launched or pod):
        return
    try:
        jax.distributed.initialize(**arguments)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the other processes of this run cannot be joined: {error}; set "
            f"{', '.join(_BY_HAND)} in each of them, or runtime.distributed=off to train alone"
        ) from error


def _by_hand(environment: Mapping[str, str]) -> dict[str, str | int]:
    """The arguments of jax.distributed.initialize from the environment; {} if none is set."""
    found = {name: environment[name] for name in _BY_HAND if environment.get(name)}
    if not found:
        return {}
    missing = [name for name in _BY_HAND if name not in found]
    numbers = [found.get(name, "0") for name in _BY_HAND[1:]]
    if missing or not all(number.isdecimal() for number in numbers):
        told = ", ".join(f"{name}={value}" for name, value in found.items())
        raise UserError(
            f"found {told}; to join several processes, {', '.join(_BY_HAND)} must all be set, the "
            "last two to whole numbers"
        )
    address, count, index = (found[name] for name in _BY_HAND)
    return {
        "coordinator_address": address,
        "num_processes": int(count),
        "process_id": int(index),
    }


def make_mesh(count: int = 0) -> Mesh:
    """Returns the mesh of `count` devices, 0 meaning all, over all processes.

    Every process contributes equally many of its own devices, in the order JAX gives them.

    Raises:
      UserError: more devices asked for than there are, or a number the processes cannot share.
    """
    present, processes = jax.device_count(), jax.process_count()
    if count > present:
        raise UserError(
            f"runtime.devices = {count}: this machine shows {present} {jax.default_backend()} "
            "device(s): set at most that, or 0 for all"
        )
    if count % processes:
        raise UserError(
            f"runtime.devices = {count}: {processes} processes cannot share them evenly: set a "
            f"multiple of {processes}, or 0 for all"
        )
    each = (count or present) // processes
    chosen = []
    for process in range(processes):
        own = [device for device in jax.devices() if device.process_index == process]
        chosen += own[:each]
    axis_types = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((len(chosen),), (AXIS,), devices=chosen, axis_types=axis_types)


def check_batch(key: str, batch_size: int, mesh: Mesh) -> None:
    """Refuses a global batch that the devices cannot share.

    Args:
      key: the config key that set it, for the message.
      batch_size: global number of examples per step.
      mesh: see `make_mesh`.

    Raises:
      UserError: with the nearest batch sizes that work.
    """
    rest = batch_size % mesh.size
    if rest:
        below, above = batch_size - rest, batch_size - rest + mesh.size
        nearest = f"{below} or {above}" if below else f"{above}"
        raise UserError(
            f"{key} = {batch_size}: not divisible by the {mesh.size} devices of the mesh: set "
            f"{nearest}, or fewer devices (runtime.devices)"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of what every device holds whole: knobs, metrics, the state at first."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays whose leading axis is the example: each device holds its own rows."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def put_replicated(tree: object, mesh: Mesh) -> object:
    """Places a pytree of host values, equal in every process, whole on every device."""
    sharding = replicated(mesh)
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), tree
    )
