"""Parts of a network alone: `python block_worker.py [--no-tune]`, see serve.py.

Each `prepare` names a part (the stem, a block, the head with its pooling) and what is done with it:

    infer      values, with the moving statistics
    forward    values, with the batch's statistics
    train      the same, then the gradients of weights and input, and plain SGD

as the network has it, split over the data mesh. Inputs and gradients of outputs are random.
"""

import functools
import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from serve import Prepared, serve

from effv2_jax import startup
from effv2_jax.errors import UserError


def _prepare(task: Mapping[str, Any]) -> Prepared:
    import jax

    from effv2_jax.training import compile as programs
    from effv2_jax.training import mesh as meshes

    startup.enable_compilation_cache("auto" if task["cache"] else "none")
    mesh = meshes.make_mesh(task["devices"])
    meshes.check_batch("the batch", task["batch"], mesh)
    whole = _network(task)
    module, apply = _part(task, whole)
    x = jax.device_put(_input(task, whole.map_dtype), meshes.batch_sharding(mesh))
    variables = jax.device_put(_variables(module, x), meshes.replicated(mesh))
    step, arguments = _step(task["pass"], apply, mesh, variables, x)
    compiler = programs.Programs(devices=mesh.size, background=False)
    program = compiler.get("part", lambda: step.lower(*arguments))

    def run(steps: int) -> None:
        nonlocal arguments
        for _ in range(steps):
            result = program.run(*arguments)
            if task["pass"] == "train":
                arguments = (result[0], *arguments[1:])
        jax.block_until_ready(result)

    run(1)
    return Prepared(
        run=run, facts={"compile_seconds": program.seconds, "program_bytes": program.memory}
    )


def _network(task: Mapping[str, Any]) -> Any:
    import jax.numpy as jnp

    from effv2_jax.models.network import create_model
    from effv2_jax.training import mesh as meshes

    dtype = jnp.dtype(task["dtype"])
    return create_model(
        task["model"], dtype=dtype, lowering=task["lowering"], axis_name=meshes.AXIS
    )


def _part(task: Mapping[str, Any], whole: Any) -> tuple[Any, Callable]:
    """Returns a module of the network, and (variables, x, train) -> (output, new statistics)."""
    import jax.numpy as jnp

    from effv2_jax.models import blocks

    parts = whole._parts(train=task["pass"] != "infer")  # as the network makes its own blocks
    outer = {key: parts[key] for key in ("conv", "norm", "activation")}
    if task["part"] == "stem":
        module = blocks.Stem(whole.stem_channels, **outer)
    elif task["part"] == "head":
        module = blocks.Head(whole.head_channels, **outer)
    else:
        spec = whole.block_specs[task["block"]]
        module = (blocks.FusedMBConv if spec.fused else blocks.MBConv)(spec=spec, **parts)

    def apply(variables: Any, x: Any, train: bool) -> tuple[Any, Any]:
        mutable = ["batch_stats"] if train else []
        if task["part"] == "stem":
            x = (x.astype(jnp.float32) - 128) / 128
        y, changed = module.apply(variables, x.astype(whole.map_dtype), train, mutable=mutable)
        if task["part"] == "head":
            y = jnp.mean(y, (1, 2), dtype=jnp.float32)
        elif task["part"] != "stem":
            y = y[0]
        return y, changed.get("batch_stats")

    return module, apply


def _input(task: Mapping[str, Any], dtype: Any) -> Any:
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(0)
    shape = (task["batch"], *task["input"])
    if task["part"] == "stem":
        return rng.integers(0, 256, shape, dtype=np.uint8)
    return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)


def _variables(module: Any, x: Any) -> Any:
    """Random kernels, norms as they begin; drawn with NumPy, which takes no time."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    shape = jax.ShapeDtypeStruct((1, *x.shape[1:]), jnp.float32)
    # Arguments: images, train. Statistics are not exchanged while shapes are inferred.
    shapes = jax.eval_shape(functools.partial(module.init, train=False), jax.random.key(0), shape)
    rng = np.random.default_rng(1)

    def draw(path: tuple, leaf: Any) -> Any:
        if path[-1].key == "kernel":
            fan_in = np.prod(leaf.shape[:-1])
            return rng.standard_normal(leaf.shape, np.float32) / np.float32(np.sqrt(fan_in))
        value = 1 if path[-1].key in ("scale", "var") else 0
        return np.full(leaf.shape, value, np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def _step(
    kind: str, apply: Callable, mesh: Any, variables: Any, x: Any
) -> tuple[Any, tuple[Any, ...]]:
    """Returns the jitted step and its arguments."""
    import jax

    from effv2_jax.training import mesh as meshes

    split, whole = jax.sharding.PartitionSpec(meshes.AXIS), jax.sharding.PartitionSpec()

    def on_mesh(function: Callable, inputs: tuple, outputs: Any, **options: Any) -> Any:
        mapped = jax.shard_map(
            function, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False
        )
        return jax.jit(mapped, **options)

    def forward(variables: Any, x: Any) -> Any:
        return apply(variables, x, kind != "infer")[0]

    values = on_mesh(forward, (whole, split), split)
    if kind != "train":
        return values, (variables, x)
    shape = jax.eval_shape(values, variables, x)
    gradient = jax.device_put(
        jax.random.normal(jax.random.key(2), shape.shape, shape.dtype),
        meshes.batch_sharding(mesh),
    )

    def train(variables: Any, x: Any, gradient: Any) -> Any:
        def values_of(params: Any, x: Any) -> Any:
            return apply({**variables, "params": params}, x, True)

        if x.dtype == gradient.dtype:
            _, pull, statistics = jax.vjp(values_of, variables["params"], x, has_aux=True)
            of_params, of_x = pull(gradient)
        else:  # pictures need no gradient
            _, pull, statistics = jax.vjp(
                lambda params: values_of(params, x), variables["params"], has_aux=True
            )
            (of_params,), of_x = pull(gradient), gradient[:0]
        of_params = jax.lax.pmean(of_params, meshes.AXIS)
        params = jax.tree.map(lambda w, g: w - 1e-3 * g, variables["params"], of_params)
        return {"params": params, "batch_stats": statistics}, of_x

    step = on_mesh(train, (whole, split, split), (whole, split), donate_argnums=0)
    return step, (variables, x, gradient)


if __name__ == "__main__":
    startup.tune(sys.argv, enabled="--no-tune" not in sys.argv)
    importlib.import_module("jax").devices()
    serve(_prepare, refusals=(UserError,))
