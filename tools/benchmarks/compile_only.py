"""Counts what the training step costs on a device that is not there: it is only compiled.

    python tools/benchmark.py compile-only h200 --model efficientnetv2-s --image-size 128,300
    python tools/benchmark.py compile-only h200 --config configs/v2s_imagenet.py      # every stage
    python tools/benchmark.py compile-only h200 --batch 32,64 --lowering auto,auto+remat
    python tools/benchmark.py compile-only v5e --image-size 128

The programs are those of a run (`training/step.py`) on a mesh of the target's devices, as XLA
compiles them for it. Bytes are the operands and results of all kernels, FLOP those of the program
before it is optimised. GPU programs are compiled without the autotuning that needs the device, so
a run may choose other kernels.
"""

import argparse
import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import forms, memory
from benchmarks.compiled_program import count
from benchmarks.results import OWN
from benchmarks.targets import TARGETS, Target, check_plugin, topology_mesh
from effv2_jax.command import Parser, check_output, positive, say, written
from effv2_jax.errors import UserError

if TYPE_CHECKING:
    import jax

    from effv2_jax.training.recipe import Recipe

_NUM_CLASSES = 1000
# Sizes and batches of a recipe's stages do not depend on the data set; its steps are not made.
_NUM_EXAMPLES = 1_281_167


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A program: what is counted apart."""

    model: str
    image_size: int
    batch: int  # of one device
    dtype: str
    lowering: str


def run(arguments: Sequence[str]) -> None:
    """Compiles, counts and prints.

    Raises:
        UserError: arguments that are wrong, or a plugin that is not installed.
    """
    flags = _parse(arguments)
    target = TARGETS[flags.target]
    # No device is looked for; the plugin is only asked to compile.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # what the plugin misses without a device

    cases, recipe = _cases(flags)
    check_plugin(target)
    mesh = topology_mesh(target, flags.devices or target.devices)
    environment = _environment(flags, mesh)
    print(_told(environment))
    results = []
    for case in cases:
        results.append(_measure(case, recipe, flags=flags, mesh=mesh, target=target))
        _print_result(results[-1], heaviest=flags.top)
        if flags.json is not None:
            with written(flags.json) as temporary:
                content = {"environment": environment, "results": results}
                temporary.write_text(json.dumps(content, indent=1) + "\n")
    if len(set(flags.batch)) == 2:
        print(f"\n{memory.header()}")
        for few, many in zip(results[::2], results[1::2], strict=True):
            print(memory.line(_fit(few, many)))


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(__doc__, prog="tools/benchmark.py compile-only")

    def several(kind: Any) -> Any:
        def read(text: str) -> list[Any]:
            return [kind(part) for part in text.split(",")]

        return read

    def option(text: str) -> tuple[str, str]:
        name, separator, value = text.partition("=")
        if not separator:
            raise argparse.ArgumentTypeError(f"found {text!r}, expected NAME=VALUE")
        return name, value

    add = parser.add_argument
    add("target", choices=tuple(TARGETS), help="what to compile for")
    add("--model", default="efficientnetv2-s", help="name (%(default)s)")
    add("--image-size", type=several(positive), default=[300], help="px, separated by commas (300)")
    add(
        "--batch",
        type=several(positive),
        default=[64],
        help="images on each device (64); of two sizes follows how large a batch fits",
    )
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="compute type")
    add("--mode", choices=("train", "infer"), default="train", help="which step")
    add(
        "--lowering",
        type=several(str),
        default=["auto"],
        help=f"forms of the operations, separated by commas: {forms.TEXT}",
    )
    add("--config", default=None, help="a recipe: its model, its training step, its stages' sizes")
    add("--devices", type=positive, default=None, help="of the mesh (h200: 1, v5e: 4)")
    add("--xla", type=option, action="append", default=[], metavar="NAME=VALUE", help="XLA option")
    add("--top", type=int, default=0, metavar="N", help="print the N heaviest kernels")
    add("--json", default=None, metavar="FILE", help="write all numbers there")
    add("--text", default=None, metavar="FOLDER", help="write the compiled programs there")
    flags = parser.parse_args(arguments)
    check_output("--json", flags.json)
    if flags.text is not None and not Path(flags.text).is_dir():
        raise UserError(f"--text {flags.text}: there is no such folder")
    return flags


def _cases(flags: argparse.Namespace) -> "tuple[list[Case], Recipe]":
    """Returns the programs to compile and how they train."""
    from effv2_jax.models.variants import get_variant
    from effv2_jax.training.recipe import Recipe
    from effv2_jax.training.schedules import make_schedule

    forms.check("--lowering", flags.lowering)
    get_variant(flags.model)
    model, sizes = flags.model, flags.image_size
    recipe = Recipe(
        num_classes=_NUM_CLASSES,
        schedule=make_schedule("constant", 1e-3, total_steps=1e6),
        total_steps=1e6,
        optimizer="sgd",
    )
    if flags.config is not None:
        model, sizes, recipe = _configured(flags.config)
    asked = [form.replace("auto", TARGETS[flags.target].lowering) for form in flags.lowering]
    cases = [
        Case(model=model, image_size=size, batch=batch, dtype=flags.dtype, lowering=form)
        for size, form, batch in itertools.product(sizes, asked, sorted(set(flags.batch)))
    ]
    return cases, recipe


def _configured(name: str) -> "tuple[str, list[int], Recipe]":
    """Returns model, image sizes of the stages and recipe of a config file."""
    from effv2_jax import config as configs
    from effv2_jax.config_files import load_config, split_argument
    from effv2_jax.models.variants import get_variant
    from effv2_jax.training.progressive import make_stages
    from effv2_jax.training.recipe import make_recipe

    config = load_config(*split_argument(name))
    configs.validate(config)
    variant = get_variant(config.model.name)
    stages = make_stages(config, variant=variant, num_examples=_NUM_EXAMPLES)
    recipe = make_recipe(
        config, stages=stages, num_examples=_NUM_EXAMPLES, num_classes=_NUM_CLASSES
    )
    return config.model.name, sorted({stage.image_size for stage in stages}), recipe


def _measure(
    case: Case,
    recipe: "Recipe",
    *,
    flags: argparse.Namespace,
    mesh: "jax.sharding.Mesh",
    target: Target,
) -> dict[str, Any]:
    """Compiles a case and returns its counts, per image of one device."""
    import jax

    from effv2_jax.training.compile import device_memory

    say(f"compiling {case.model}, {case.image_size} px, batch {case.batch}, {case.lowering} ...")
    start = time.perf_counter()
    lowered, largest = _lower(case, recipe, mesh=mesh, mode=flags.mode)
    compiled = lowered.compile(compiler_options=dict(flags.xla))
    seconds = time.perf_counter() - start
    text = compiled.as_text()
    if flags.text is not None:
        name = f"{case.model}_{case.image_size}px_{case.batch}_{case.lowering}_{flags.mode}.txt"
        Path(flags.text, name).write_text(text)
    counts = count(text, large=largest)
    cost = compiled.cost_analysis() or {}
    planned = compiled.memory_analysis()

    # Of one image on one device of this machine, with XLA's own convolutions: what is asked for.
    auto = (jax.sharding.AxisType.Auto,)
    here = jax.make_mesh((1,), mesh.axis_names, devices=jax.devices("cpu")[:1], axis_types=auto)
    asked, _ = _lower(
        dataclasses.replace(case, lowering="plain"), recipe, mesh=here, mode=flags.mode
    )
    heaviest = [
        {"bytes_per_image": size / case.batch, "kind": kind, "name": name, "from": origin}
        for size, kind, name, origin in counts.heaviest[: max(flags.top, 0)]
    ]
    return {
        **dataclasses.asdict(case),
        "mode": flags.mode,
        "bytes_per_image": counts.bytes / case.batch,
        "bytes_per_image_xla": cost["bytes accessed"] / case.batch if cost else None,
        "flop_per_image": asked.cost_analysis()["flops"] / case.batch,
        "temporaries_per_image": planned.temp_size_in_bytes / case.batch,
        "argument_bytes": planned.argument_size_in_bytes,
        "device_bytes": device_memory(compiled),
        "images_per_second_bound": target.bytes_per_second * case.batch / counts.bytes,
        "kernels": counts.kernels,
        "collectives": counts.collectives,
        "collective_bytes": counts.collective_bytes,
        "transposes_of_activations": counts.transposes,
        "transposes_of_parameters": counts.small_transposes,
        "loops": counts.loops,
        "parts_per_image": {name: size / case.batch for name, size in counts.parts.items()},
        "heaviest": heaviest,
        "compile_seconds": seconds,
    }


def _fit(few: dict[str, Any], many: dict[str, Any]) -> dict[str, Any]:
    """How large a batch fits, as the part `memory` says it."""
    return {
        **few,
        "framework": OWN,
        "asked": {"lowering": few["lowering"]},
        **memory.fit([(case["batch"], case["device_bytes"]) for case in (few, many)]),
    }


def _lower(
    case: Case, recipe: "Recipe", *, mesh: "jax.sharding.Mesh", mode: str
) -> "tuple[jax.stages.Lowered, int]":
    """Traces a step from shapes alone; also returns the elements of the largest parameter."""
    import functools

    import jax
    import jax.numpy as jnp

    from effv2_jax.models.network import create_model
    from effv2_jax.training import mesh as meshes
    from effv2_jax.training import step as steps
    from effv2_jax.training.progressive import plan_stages

    replicated, split = meshes.replicated(mesh), meshes.batch_sharding(mesh)

    def placed(tree: Any, sharding: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    make = functools.partial(create_model, case.model, _NUM_CLASSES, dtype=jnp.dtype(case.dtype))
    if not recipe.ema_decay:  # the plain recipe: the network alone
        make = functools.partial(make, dropout_rate=0.0, survival_prob=1.0)
    model = make(axis_name=meshes.AXIS, **forms.overrides(case.lowering))
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(make(lowering="plain").init, jax.random.key(0), images)
    total = case.batch * mesh.size
    shape = (total, case.image_size, case.image_size, 3)
    batch = {
        "image": jax.ShapeDtypeStruct(shape, jnp.uint8),
        "label": jax.ShapeDtypeStruct((total,), jnp.int32),
    }
    largest = max(leaf.size for leaf in jax.tree.leaves(variables))
    if mode == "infer":
        batch["mask"] = jax.ShapeDtypeStruct((total,), jnp.float32)
        step = jax.jit(steps.make_eval_step(model, recipe, mesh=mesh))
        return step.lower(placed(variables, replicated), placed(batch, split)), largest
    (stage,) = plan_stages(
        num_examples=total,
        batch_size=total,
        epochs=1,
        image_size=case.image_size,
        dropout_rate=float(model.dropout_rate),
    )
    state = jax.eval_shape(functools.partial(steps.create_state, recipe), variables)
    knobs = steps.stage_knobs(stage, recipe, seed=0)
    step = jax.jit(steps.make_train_step(model, recipe, mesh=mesh), donate_argnums=0)
    arguments = (placed(state, replicated), placed(batch, split), placed(knobs, replicated))
    return step.lower(*arguments), largest


def _environment(flags: argparse.Namespace, mesh: "jax.sharding.Mesh") -> dict[str, Any]:
    """What the numbers depend on."""
    import jax
    import jaxlib

    return {
        "command": " ".join(["tools/benchmark.py", *_without_outputs(sys.argv[1:])]),
        "target": flags.target,
        "device": mesh.devices.flat[0].device_kind,
        "devices": mesh.size,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "xla_options": dict(flags.xla),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "recipe": flags.config or "plain: softmax, SGD, moving statistics of BatchNorm",
    }


def _without_outputs(arguments: Sequence[str]) -> Iterator[str]:
    """Leaves out where results were written: nobody else's folder."""
    words = iter(arguments)
    for word in words:
        if word in ("--json", "--text"):
            next(words, None)
        elif not word.startswith(("--json=", "--text=")):
            yield word


def _told(environment: dict[str, Any]) -> str:
    options = "".join(f" --{k}={v}" for k, v in environment["xla_options"].items())
    return (
        f"compiled for {environment['devices']} x {environment['device']}, not run; "
        f"jax {environment['jax']}, jaxlib {environment['jaxlib']}{options}\n"
        f"recipe: {environment['recipe']}"
    )


def _print_result(result: dict[str, Any], *, heaviest: int) -> None:
    for line in _lines(result):
        print(line)
    for kernel in result["heaviest"][:heaviest]:
        print(
            f"    {kernel['bytes_per_image'] / 1e6:8.2f} MB  {kernel['kind']:<14} "
            f"{kernel['name']}  {kernel['from']}"
        )
    sys.stdout.flush()


def _lines(result: dict[str, Any]) -> Iterator[str]:
    """The table of one program."""
    mega = 1e-6
    yield (
        f"\n{result['model']}, {result['image_size']} px, batch {result['batch']} per device, "
        f"{result['dtype']}, {result['mode']}, lowering {result['lowering']}"
    )
    rows = {
        "bytes / image": f"{mega * result['bytes_per_image']:,.1f} MB",
        "FLOP / image": f"{1e-9 * result['flop_per_image']:,.1f} G",
        "temporaries / image": f"{mega * result['temporaries_per_image']:,.1f} MB",
        "memory": f"{1e-9 * result['device_bytes']:,.2f} GB",
        "memory allows": f"{result['images_per_second_bound']:,.0f} images/s on a device",
        "kernels": _kernels_told(result["kernels"]),
        "collectives": f"{result['collectives']} ({mega * result['collective_bytes']:,.1f} MB)",
        "transposes": (
            f"{result['transposes_of_activations']} of activations, "
            f"{result['transposes_of_parameters']} of parameters and smaller"
        ),
        "compiled in": f"{result['compile_seconds']:,.0f} s",
    }
    if result["loops"]:
        rows["loops"] = f"{result['loops']}, their bodies counted once"
    if result["bytes_per_image_xla"] is not None:
        rows["bytes / image, XLA"] = f"{mega * result['bytes_per_image_xla']:,.1f} MB"
    for name, value in rows.items():
        yield f"  {name:<20} {value}"
    for name, size in result["parts_per_image"].items():
        yield f"    {mega * size:8.1f} MB  {name}"


def _kernels_told(kernels: dict[str, int]) -> str:
    parts = sorted(kernels.items(), key=lambda item: -item[1])
    told = " + ".join(f"{number:,} {kind}" for kind, number in parts)
    return f"{sum(kernels.values()):,} = {told}"
