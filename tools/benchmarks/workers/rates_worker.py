"""What the machine can do at most: `python rates_worker.py [--no-tune]`, see serve.py.

Matrix products and copies, measured with the process settings of the commands on all devices of
the mesh at once: the denominators of "share of the matrix rate" and "share of the bandwidth".
"""

import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from serve import Prepared, serve

from effv2_jax import startup

_REPEATS = 20


def _prepare(task: Mapping[str, Any]) -> Prepared:
    import jax
    import jaxlib

    from effv2_jax.training import mesh as meshes

    mesh = meshes.make_mesh(task["devices"])
    facts = {
        "tuning": TUNING.removeprefix("tuning: "),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "backend": jax.default_backend(),
        "device": mesh.devices.flat[0].device_kind,
        "processor": _processor(),
        "devices": mesh.size,
        "cores": startup.usable_cores(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "variables": {
            name: os.environ[name]
            for name in ("LD_PRELOAD", "MALLOC_CONF", "GLIBC_TUNABLES", "XLA_FLAGS")
            if name in os.environ
        },
        "matmul_flops": {dtype: _matmul(mesh, dtype) for dtype in task["dtypes"]},
        "copy_bytes": _copy(mesh),
    }
    return Prepared(run=lambda steps: None, facts=facts)


def _matmul(mesh: Any, dtype: str) -> float:
    """Operations per second of square matrix products with sums of 32 bits; a multiply-add is two.

    For narrower sums XLA's CPU backend would widen the numbers before it multiplies them.
    """
    import jax
    import jax.numpy as jnp

    side = 1024 if jax.default_backend() == "cpu" else 8192
    key = jax.random.key(0)  # zeros would be faster than any network's numbers
    values = jax.random.normal(key, (mesh.size, side, side), jnp.dtype(dtype)) / side
    seconds = _fastest(mesh, lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32), values)
    return 2 * mesh.size * side**3 / seconds


def _copy(mesh: Any) -> float:
    """Bytes per second, read and written, of arrays far larger than the caches."""
    import jax
    import jax.numpy as jnp

    count = 2**25 if jax.default_backend() == "cpu" else 2**28
    values = jnp.ones((mesh.size, count), jnp.float32)
    seconds = _fastest(mesh, lambda x: x + 1, values)
    return 2 * values.nbytes / seconds


def _fastest(mesh: Any, function: Callable[[Any], Any], values: Any) -> float:
    """Seconds of the fastest of several calls on all devices at once."""
    import jax

    from effv2_jax.training import mesh as meshes

    split = jax.sharding.PartitionSpec(meshes.AXIS)
    program = jax.jit(
        jax.shard_map(function, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    )
    values = jax.device_put(values, meshes.batch_sharding(mesh))
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(program(values))
        times.append(time.perf_counter() - start)
    return min(times)


def _processor() -> str:
    """The processor's name, as the system has it."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(
                line.split(":")[1].strip() for line in file if line.startswith("model name")
            )
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    TUNING = startup.tune(sys.argv, enabled="--no-tune" not in sys.argv)
    serve(_prepare)
