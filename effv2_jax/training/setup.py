"""The parts of a run, made from its config: what is needed before the first step, and all checks.

Nothing here writes a file or compiles: whatever is wrong with config, data or devices is said
before the workdir is touched.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from effv2_jax.data.examples import Source
from effv2_jax.data.sources import open_source
from effv2_jax.errors import UserError
from effv2_jax.models.initial_variables import init_variables
from effv2_jax.models.network import create_model
from effv2_jax.models.variants import get_variant
from effv2_jax.training import channel_parallel
from effv2_jax.training import mesh as meshes
from effv2_jax.training.progressive import Stage, make_stages, resolve_image_size
from effv2_jax.training.recipe import Recipe, make_recipe
from effv2_jax.training.step import TrainState, create_state
from effv2_jax.training.transfer import transfer

_MODEL_OVERRIDES = (
    "width",
    "depth",
    "blocks",
    "activation",
    "survival_prob",
    "remat",
    "remat_fused",
    "remat_norms",
    "bn_momentum",
    "bn_epsilon",
    "bn_group_size",
    "padding",
    "head_bias",
    "initializer",
    "lowering",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """The parts of a run.

    Attributes:
        config: complete and validated.
        mesh: the devices.
        train_source: training examples.
        eval_source: evaluation examples.
        model: the network, as it is saved.
        recipe: how to train.
        stages: the plan.
        eval_size: px.
        eval_batch_size: global.
    """

    config: ConfigDict
    mesh: Mesh
    train_source: Source
    eval_source: Source
    model: nn.Module
    recipe: Recipe
    stages: tuple[Stage, ...]
    eval_size: int
    eval_batch_size: int

    @property
    def num_examples(self) -> int:
        """Training examples in an epoch."""
        return len(self.train_source)

    @property
    def mesh_model(self) -> nn.Module:
        """The network as the steps use it: it knows the mesh axis and its part on a device."""
        return channel_parallel.for_mesh(self.model, self.mesh)

    def train_batch(self, image_size: int, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of a training batch, split over the mesh."""
        return self._batch(batch_size, (image_size, image_size, 3), np.uint8)

    def eval_batch(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of an evaluation batch, split over the mesh."""
        batch = self._batch(batch_size, (self.eval_size, self.eval_size, 3), np.float32)
        sharding = meshes.batch_sharding(self.mesh)
        return {**batch, "mask": jax.ShapeDtypeStruct((batch_size,), np.float32, sharding=sharding)}

    def state_shardings(self, state: TrainState, image_size: int, batch_size: int) -> TrainState:
        """Returns how a state (arrays or shapes) lies on the mesh for batches of this size."""
        images = (batch_size, image_size, image_size, 3)
        blocks = self.mesh_model.channel_parallel_blocks(images)
        return channel_parallel.shardings(state, blocks, self.mesh)

    def train_state(self, state: TrainState, image_size: int, batch_size: int) -> TrainState:
        """Returns the shapes of a state, lying as the steps with batches of this size want it."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            state,
            self.state_shardings(state, image_size, batch_size),
        )

    def _batch(
        self, size: int, image: tuple[int, int, int], dtype: Any
    ) -> dict[str, jax.ShapeDtypeStruct]:
        multilabel = self.recipe.multilabel
        label_shape = (size, self.recipe.num_classes) if multilabel else (size,)
        label_dtype = np.float32 if multilabel else np.int32
        sharding = meshes.batch_sharding(self.mesh)
        return {
            "image": jax.ShapeDtypeStruct((size, *image), dtype, sharding=sharding),
            "label": jax.ShapeDtypeStruct(label_shape, label_dtype, sharding=sharding),
        }


def prepare(config: ConfigDict) -> Setup:
    """Opens the data and makes the parts of a run; writes nothing.

    Args:
        config: validated by `effv2_jax.config.validate`.

    Raises:
        UserError: the data, the devices and the config do not fit together.
    """
    mesh = meshes.make_mesh(config.runtime.devices)
    variant = get_variant(config.model.name)
    for key, size in _batch_sizes(config):
        meshes.check_batch(key, size, mesh)
    train_source = open_source(config.data, "train")
    eval_source = open_source(config.data, "eval")
    num_classes = _num_classes(config, train_source, eval_source)
    overrides = {key: config.model[key] for key in _MODEL_OVERRIDES}
    num_examples = len(train_source)
    stages = make_stages(config, variant=variant, num_examples=num_examples)
    return Setup(
        config=config,
        mesh=mesh,
        train_source=train_source,
        eval_source=eval_source,
        model=create_model(
            config.model.name, num_classes, dtype=compute_dtype(config.model.dtype), **overrides
        ),
        recipe=make_recipe(
            config, stages=stages, num_examples=num_examples, num_classes=num_classes
        ),
        stages=stages,
        eval_size=resolve_image_size(
            config.eval.image_size, variant.eval_size, key="eval.image_size"
        ),
        eval_batch_size=config.eval.batch_size or config.train.batch_size,
    )


def state_shapes(setup: Setup) -> TrainState:
    """Returns the shapes and dtypes of the state, replicated, without computing anything."""
    size = setup.stages[0].image_size
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(setup.model.init, jax.random.key(0), images)
    shapes = jax.eval_shape(functools.partial(create_state, setup.recipe), variables)
    sharding = meshes.replicated(setup.mesh)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes
    )


def initial_state(setup: Setup) -> TrainState:
    """Returns the state before the first step, replicated on the devices of the mesh.

    Raises:
        UserError: init.weights names weights that fit neither the network nor the data.
    """
    variables = init_variables(setup.model, setup.config.train.seed, setup.stages[0].image_size)
    if setup.config.init.weights:
        variables, told = transfer(
            variables,
            setup.model,
            spec=setup.config.init.weights,
            preprocessing=setup.config.data.preprocessing,
        )
        if jax.process_index() == 0:
            print(told, flush=True)
    create = jax.jit(
        functools.partial(create_state, setup.recipe), out_shardings=meshes.replicated(setup.mesh)
    )
    return create(jax.tree.map(np.asarray, variables))


def shapes_of(tree: Any) -> Any:
    """Returns the shapes, dtypes and shardings of a pytree of jax arrays."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )


def evaluated_variables(config: ConfigDict, state: TrainState) -> dict[str, Any]:
    """Returns which variables are evaluated: prefix of the metrics' names -> variables."""
    weights = {}
    if config.eval.raw:
        weights[""] = {"params": state.params, "batch_stats": state.batch_stats}
    if config.eval.ema and config.train.ema_decay:
        weights["ema_"] = state.ema
    return weights


def nonfinite_leaf(state: TrainState) -> str | None:
    """Returns the path of a leaf with a value that is not finite, or None."""
    for path, leaf in jax.tree.leaves_with_path(state):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            continue
        shards = leaf.addressable_shards[: 1 if leaf.is_fully_replicated else None]
        for values in (np.asarray(shard.data) for shard in shards):
            # The sum is ten times faster; it overflows for finite values only if they are absurd.
            if not np.isfinite(np.sum(values)) and not np.isfinite(values).all():
                return jax.tree_util.keystr(path, simple=True, separator="/")
    return None


def facts(setup: Setup, state: TrainState) -> dict[str, Any]:
    """Returns what plan.json says of the run beside its stages."""
    return {
        "model": setup.config.model.name,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "num_classes": setup.recipe.num_classes,
        "dtype": jnp.dtype(setup.model.dtype).name,
        "devices": setup.mesh.size,
        "platform": setup.mesh.devices.flat[0].device_kind,
        "processes": jax.process_count(),
        "train_examples": len(setup.train_source),
        "eval_examples": len(setup.eval_source),
        "eval_size": setup.eval_size,
        "eval_batch_size": setup.eval_batch_size,
        "steps": setup.stages[-1].end_step,
    }


def describe(setup: Setup, state: TrainState) -> list[str]:
    """Returns the lines that say what runs: network, data, devices."""
    known = facts(setup, state)
    devices = f"{known['devices']} x {known['platform']}"
    if known["processes"] > 1:
        devices += f" in {known['processes']} processes"
    data = setup.config.data
    return [
        f"model: {known['model']}, {known['parameters']:,} parameters, {known['num_classes']} "
        f"classes, {known['dtype']}",
        f"data: {data.source}{' ' + data.name if data.name else ''}, {known['train_examples']:,} "
        f"training and {known['eval_examples']:,} evaluation examples, evaluated at "
        f"{known['eval_size']} px",
        f"devices: {devices}",
    ]


def _batch_sizes(config: ConfigDict) -> list[tuple[str, int]]:
    listed = [("progressive.batch_sizes", size) for size in config.progressive.batch_sizes]
    return listed or [("train.batch_size", config.train.batch_size)]


def compute_dtype(name: str) -> Any:
    """Returns the type that model.dtype names; "auto" depends on the backend."""
    if name == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return jnp.dtype(name).type


def _num_classes(config: ConfigDict, train: Source, evaluation: Source) -> int:
    found = max(train.num_classes, evaluation.num_classes)
    asked = config.model.num_classes
    if asked is None:
        return found
    if asked < found:
        raise UserError(
            f"model.num_classes = {asked}: the data set has {found} classes: leave it out to take "
            f"those, or set {found} or more"
        )
    return asked
