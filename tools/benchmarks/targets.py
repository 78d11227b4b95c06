"""Devices that a program can be compiled for where there is none of them."""

import dataclasses
import importlib.util
from typing import TYPE_CHECKING

from effv2_jax.errors import UserError

if TYPE_CHECKING:
    import jax

# What XLA asks a device for, of NVIDIA's data sheet and CUDA's limits for compute capability 9.0;
# the XLA repository has such descriptions under its GPU backend.
_H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 151397597184 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 } name: "NVIDIA H200"
  runtime_version: "12.9.0" driver_version: "13.0.0" compile_time_toolkit_version: "12.9.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } device_description_str: "NVIDIA H200"
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of device.

    Attributes:
        name: of the command line.
        platform: JAX's name.
        plugins: modules, one of which compiles for it.
        extra: of this package, installs the plugin.
        lowering: the row of `models/lowering` that "auto" takes on it.
        devices: fewest devices of a topology.
        bytes_per_second: of its memory, from the data sheet.
    """

    name: str
    platform: str
    plugins: tuple[str, ...]
    extra: str
    lowering: str
    devices: int
    bytes_per_second: float


TARGETS = {
    "h200": Target(
        name="h200",
        platform="cuda",
        plugins=("jax_cuda12_plugin", "jax_cuda13_plugin"),
        extra="cuda12",
        lowering="gpu",
        devices=1,
        bytes_per_second=4.8e12,
    ),
    "v5e": Target(
        name="v5e",
        platform="tpu",
        plugins=("libtpu",),
        extra="tpu",
        lowering="plain",
        devices=4,
        bytes_per_second=8.19e11,
    ),
}

# Devices of a slice -> its shape.
_V5E = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8"}


def check_plugin(target: Target) -> None:
    """Raises UserError unless something that compiles for the target is installed."""
    if not any(importlib.util.find_spec(name) for name in target.plugins):
        raise UserError(
            f"compiling for {target.name} needs a JAX plugin, found none of "
            f'{", ".join(target.plugins)}: pip install "effv2_jax[{target.extra}]"'
        )


def topology_mesh(target: Target, devices: int) -> "jax.sharding.Mesh":
    """Returns the data mesh over devices that exist only for the compiler."""
    import jax
    import numpy as np
    from jax.experimental import topologies

    from effv2_jax.training.mesh import AXIS

    if target.platform == "cuda":
        options = {"target_config": _H200, "topology": f"1x1x{devices}"}
        topology = topologies.get_topology_desc("", "cuda", **options)
    else:
        if devices not in _V5E:
            raise UserError(
                f"--devices is {devices}: v5e has slices of {', '.join(map(str, _V5E))}"
            )
        topology = topologies.get_topology_desc(f"v5e:{_V5E[devices]}", "tpu")
    axis_types = (jax.sharding.AxisType.Auto,)
    return jax.sharding.Mesh(np.array(topology.devices), (AXIS,), axis_types=axis_types)
