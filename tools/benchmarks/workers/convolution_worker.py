"""One convolution alone, on one device: `python convolution_worker.py`, see serve.py.

Each `prepare` names its shape, the form it is computed in (models/lowering), and the pass: values,
the gradient of the input or the gradient of the weights.
"""

import importlib
import sys
from collections.abc import Mapping
from typing import Any

from serve import Prepared, serve

from effv2_jax import startup


def _prepare(task: Mapping[str, Any]) -> Prepared:
    import jax
    import jax.numpy as jnp

    from effv2_jax.models import lowering
    from effv2_jax.training import compile as programs

    startup.enable_compilation_cache("auto" if task["cache"] else "none")
    side, channels, kernel = task["side"], task["channels"], task["kernel"]
    dtype = jnp.dtype(task["dtype"])
    # As in a network: maps are of a type of their own, and a kernel says what is multiplied.
    map_type = lowering.choose(task["lowering"]).map_type(dtype)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (task["batch"], side, side, channels), map_type)
    is_depthwise = task["type"] == "depthwise"
    convolve = lowering.depthwise_conv2d if is_depthwise else lowering.conv2d
    fan_in = 1 if is_depthwise else channels
    shape = (kernel, kernel, fan_in, task["filters"])
    weights = jax.random.normal(keys[1], shape, jnp.float32)

    def values(x: Any, weights: Any) -> Any:
        return convolve(
            x, weights.astype(dtype), stride=task["stride"], implementation=task["lowering"]
        )

    shape = jax.eval_shape(values, x, weights).shape
    gradient = jax.random.normal(keys[2], shape, map_type)
    passes = {
        "values": lambda x, w, g: values(x, w),
        "of input": lambda x, w, g: jax.vjp(lambda x: values(x, w), x)[1](g)[0],
        "of weights": lambda x, w, g: jax.vjp(lambda w: values(x, w), w)[1](g)[0],
    }
    step = jax.jit(passes[task["pass"]])
    program = programs.Programs(background=False).get(
        "pass", lambda: step.lower(x, weights, gradient)
    )

    def run(steps: int) -> None:
        for _ in range(steps):
            result = program.run(x, weights, gradient)
        jax.block_until_ready(result)

    run(1)
    return Prepared(run=run, facts={"compile_seconds": program.seconds})


if __name__ == "__main__":
    startup.tune(sys.argv, enabled="--no-tune" not in sys.argv)
    importlib.import_module("jax").devices()
    serve(_prepare)
