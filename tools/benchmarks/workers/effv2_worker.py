"""This project's own steps: `python effv2_worker.py [--no-tune]`, see serve.py.

The programs are those of a run (`training/step.py`), with its process settings, compiled ahead for
the data mesh. Inference is from uint8 pictures to logits. Images and labels are random and valid.
"""

import dataclasses
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import kernels
from serve import Prepared, serve

from effv2_jax import startup
from effv2_jax.errors import UserError

# What a peer needs to run with the same allocator, and what says how XLA was set.
_VARIABLES = (*startup.ALLOCATOR_VARIABLES, "XLA_FLAGS")

Run = Callable[[int], None]


def _prepare(task: Mapping[str, Any]) -> Prepared:
    import jax
    import jaxlib

    from effv2_jax.training import mesh as meshes

    startup.enable_compilation_cache("auto" if task["cache"] else "none")
    mesh = meshes.make_mesh(task["devices"] or _devices_for(task, jax.device_count()))
    meshes.check_batch("the batch", task["batch"], mesh)
    make = _inference if task["mode"] == "infer" else _training
    run, program, parameters = make(task, mesh)
    run(1)
    settings = [TUNING.removeprefix("tuning: "), f"{mesh.size} device{'s' * (mesh.size > 1)}"]
    facts = {
        "settings": ", ".join(settings),
        "versions": {"jax": jax.__version__, "jaxlib": jaxlib.__version__} | _python(),
        "device": mesh.devices.flat[0].device_kind,
        "devices": mesh.size,
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "compile_seconds": program.seconds,
        "program_bytes": program.memory,
        "xla": _counted(program.run),
        "param_count": parameters,
    }
    return Prepared(
        run=run,
        facts=facts,
        device_bytes=_device_bytes,
        profile=lambda steps: kernels.profile(
            program.run, run, steps=steps, devices=mesh.size, blocks=_network(task).block_specs
        ),
    )


def _devices_for(task: Mapping[str, Any], present: int) -> int:
    """All devices; in inference as many as share the batch evenly, for a picture alone one."""
    if task["mode"] != "infer":
        return present
    return max(count for count in range(1, present + 1) if task["batch"] % count == 0)


def _python() -> dict[str, str]:
    return {"python": sys.version.split()[0]}


def _network(task: Mapping[str, Any], **overrides: Any) -> Any:
    import jax.numpy as jnp

    from effv2_jax.models.network import create_model

    return create_model(
        task["model"],
        task["num_classes"],
        dtype=jnp.dtype(task["dtype"]),
        **_forms(task),
        **overrides,
    )


def _forms(task: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes of the network for the form that the task names."""
    return importlib.import_module("forms").overrides(task["lowering"])


def _images(task: Mapping[str, Any]) -> Any:
    import numpy as np

    shape = (task["batch"], task["image_size"], task["image_size"], 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def _labels(task: Mapping[str, Any], recipe: Any) -> Any:
    import numpy as np

    labels = np.random.default_rng(1).integers(0, recipe.num_classes, task["batch"], np.int32)
    if recipe.multilabel:
        return np.eye(recipe.num_classes, dtype=np.float32)[labels]
    return labels


def _inference(task: Mapping[str, Any], mesh: Any) -> tuple[Run, Any, int]:
    """Pictures to logits: the normalisation and the forward pass."""
    import jax

    from effv2_jax.models.infer import infer, round_kernels
    from effv2_jax.models.initial_variables import init_variables
    from effv2_jax.training import compile as programs
    from effv2_jax.training import mesh as meshes
    from effv2_jax.training.step import normalize

    model, recipe = _network(task), _recipe("plain", task)
    split, whole = jax.sharding.PartitionSpec(meshes.AXIS), jax.sharding.PartitionSpec()
    forward = jax.jit(
        jax.shard_map(
            lambda variables, images: infer(model, variables, normalize(images, recipe)),
            mesh=mesh,
            in_specs=(whole, split),
            out_specs=split,
            check_vma=False,
        )
    )
    variables = round_kernels(model, init_variables(model, 0))
    variables = jax.device_put(variables, meshes.replicated(mesh))
    images = jax.device_put(_images(task), meshes.batch_sharding(mesh))
    compiler = programs.Programs(devices=mesh.size, background=False)
    program = compiler.get("infer", lambda: forward.lower(variables, images))

    def run(steps: int) -> None:
        _one_ahead(program.run(variables, images) for _ in range(steps))

    return run, program, _count(variables["params"])


def _training(task: Mapping[str, Any], mesh: Any) -> tuple[Run, Any, int]:
    """The training step of a run: of a named recipe, or of a stage of a config."""
    import jax

    from effv2_jax.training import channel_parallel
    from effv2_jax.training import compile as programs
    from effv2_jax.training import mesh as meshes
    from effv2_jax.training.step import make_train_step, stage_knobs

    if task["config"]:
        model, recipe, stage, state = _of_config(task, mesh)
    else:
        model, recipe, stage, state = _of_recipe(task, mesh)
    batch = {"image": _images(task), "label": _labels(task, recipe)}
    blocks = model.channel_parallel_blocks(batch["image"].shape)
    state = channel_parallel.move(state, channel_parallel.shardings(state, blocks, mesh))
    batch = jax.device_put(batch, meshes.batch_sharding(mesh))
    knobs = jax.device_put(stage_knobs(stage, recipe, seed=0), meshes.replicated(mesh))
    step = jax.jit(make_train_step(model, recipe, mesh=mesh), donate_argnums=0)
    compiler = programs.Programs(devices=mesh.size, background=False)
    program = compiler.get("train", lambda: step.lower(state, batch, knobs))
    parameters = _count(state.params)

    def train() -> Any:
        nonlocal state
        state, metrics = program.run(state, batch, knobs)
        return metrics

    def run(steps: int) -> None:
        _one_ahead(train() for _ in range(steps))
        jax.block_until_ready(state)

    return run, program, parameters


def _one_ahead(results: Iterator[Any]) -> None:
    """Waits for each step once the next is under way, as a run does (`training/run.py`).

    With more than 32 under way XLA's CPU backend makes each wait for its place, and two devices for
    each other: V2-B0's inference at 128 px, batch 8, took 13.2 instead of 11.9 ms.
    """
    import jax

    before = None
    for result in results:
        jax.block_until_ready(before)
        before = result
    jax.block_until_ready(before)


def _of_config(task: Mapping[str, Any], mesh: Any) -> tuple[Any, Any, Any, Any]:
    from effv2_jax.training import setup

    configured = importlib.import_module("configured")
    config = configured.load(task["config"], devices=mesh.size, overrides=task["overrides"])
    parts = setup.prepare(config)
    parts = dataclasses.replace(parts, model=parts.model.clone(**_forms(task)))
    return parts.mesh_model, parts.recipe, parts.stages[task["stage"]], setup.initial_state(parts)


def _of_recipe(task: Mapping[str, Any], mesh: Any) -> tuple[Any, Any, Any, Any]:
    import jax

    from effv2_jax.models.initial_variables import init_variables
    from effv2_jax.training import channel_parallel
    from effv2_jax.training import mesh as meshes
    from effv2_jax.training.progressive import plan_stages
    from effv2_jax.training.step import create_state

    plain = task["recipe"] == "plain"
    overrides = {"dropout_rate": 0.0, "survival_prob": 1.0} if plain else {}
    model = channel_parallel.for_mesh(_network(task, **overrides), mesh)
    recipe = _recipe(task["recipe"], task)
    (stage,) = plan_stages(
        num_examples=10**6 * task["batch"],
        batch_size=task["batch"],
        epochs=1.0,
        image_size=task["image_size"],
        magnitude=15.0,
        dropout_rate=float(model.dropout_rate),
    )
    state = create_state(recipe, init_variables(_network(task), 0))
    return model, recipe, stage, jax.device_put(state, meshes.replicated(mesh))


def _recipe(name: str, task: Mapping[str, Any]) -> Any:
    """The recipe `name`: "plain" is SGD alone, "official" what ImageNet is trained with."""
    from effv2_jax.data.policy import make_policy
    from effv2_jax.training.recipe import Images, Recipe
    from effv2_jax.training.schedules import make_schedule

    schedule = make_schedule("constant", 1e-3, total_steps=1e6)
    common = {"num_classes": task["num_classes"], "schedule": schedule, "total_steps": 1e6}
    if name == "plain":
        return Recipe(optimizer="sgd", **common)
    return Recipe(
        optimizer="rmsprop",
        label_smoothing=0.1,
        weight_decay=1e-5,
        ema_decay=0.9999,
        images=Images(flip=True, policy=make_policy("randaugment", layers=2)),
        **common,
    )


def _count(tree: Any) -> int:
    import jax

    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _counted(compiled: Any) -> dict[str, float]:
    """What XLA counts in the compiled program, per device: operations, and bytes of its kernels."""
    found = compiled.cost_analysis() or {}
    return {key: found[key] for key in ("flops", "bytes accessed") if key in found}


def _device_bytes() -> int | None:
    import jax

    statistics = jax.local_devices()[0].memory_stats() or {}
    return statistics.get("peak_bytes_in_use")


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parent.parent))
    TUNING = startup.tune(sys.argv, enabled="--no-tune" not in sys.argv)
    # Before memory is first looked at.
    importlib.import_module("effv2_jax.training.step")
    importlib.import_module("jax").devices()
    serve(_prepare, refusals=(UserError,))
