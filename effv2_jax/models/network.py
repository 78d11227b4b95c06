"""The network: stem, blocks, head. One class reads every row of `variants.py`.

Official: effnetv2_model.py (EffNetV2Model) of google/automl, efficientnetv2.
"""

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from effv2_jax.errors import UserError
from effv2_jax.models import blocks as block_modules
from effv2_jax.models import layers, lowering
from effv2_jax.models.block_spec import BlockSpec, expand_blocks, parse_blocks, round_channels
from effv2_jax.models.norm import BatchNorm
from effv2_jax.models.remat import recomputed
from effv2_jax.models.variants import get_variant

Array = jax.Array
Rate = float | Array | None
SurvivalFunction = Callable[[int, int, float | Array], float | Array]


def linear_survival(index: int, count: int, survival_prob: float | Array) -> float | Array:
    """Survival probability of block `index` of `count`: 1 for the first, falling linearly.

    Official: effnetv2_model.py, EffNetV2Model.call. The divisor is the number of all blocks, so
    that even the last one survives a little more often than `survival_prob`.
    """
    return 1 - (1 - survival_prob) * index / count


class EfficientNet(nn.Module):
    """EfficientNet V1 or V2; made by `create_model`.

    Attributes:
      variant: name in `variants.py`.
      blocks: rows, before width and depth scale them.
      width: multiplier of channels.
      depth: multiplier of repeats.
      feature_size: channels of the head, before width scales them.
      num_classes: outputs; 0: the pooled features are the output.
      activation: name in `layers.ACTIVATIONS`.
      dropout_rate: before the classifier, in training; the argument of the call wins.
      survival_prob: of the last block, in training; 0 or 1: every block always survives.
      survival_fn: (index, count, survival_prob) -> probability of the block; not asked when
        survival_prob is 0 or 1.
      bn_momentum: weight of the old moving statistics.
      bn_epsilon: added to variances.
      bn_group_size: examples that share BatchNorm statistics; 0: all of the global batch.
      bn_unbiased: whether the moving variance is unbiased (TensorFlow on CPU and GPU) or not (TPU).
      bn_two_pass: variance in two passes: slower, more exact.
      head_bias: initial bias of the classifier.
      initializer: how kernels are drawn, "official" or "fan_in" (`layers.initial_kernel`).
      padding: "SAME" (TensorFlow) or "SYMMETRIC" (PyTorch).
      remat: recompute each block in the backward pass: less memory, a third more arithmetic.
      remat_fused: FusedMBConv too, whose 3x3 convolutions cost most for the memory they give back;
        False: MBConv alone.
      remat_norms: recompute norms, activations and squeeze-and-excite, but no convolution, in every
        block but FusedMBConv with squeeze-and-excite: less memory, a few more passes over it.
      lowering: how layers are computed, one of `lowering.IMPLEMENTATIONS`.
      axis_name: mesh axis over which the batch is split, when applied inside `jax.shard_map`.
      channel_parallel: devices of that axis that divide the inner channels of the last blocks
        (`channel_parallel_blocks`) in training: each has all images there and its part of the
        channels, with the variables that belong to them; 1: images are divided everywhere.
      freeze: regular expression; norms whose parameters match it are frozen (`norm.BatchNorm`).
      dtype: compute type; parameters, statistics and logits are float32 always, on CPUs the maps
        between convolutions too (`map_dtype`).
    """

    variant: str
    blocks: tuple[BlockSpec, ...]
    width: float
    depth: float
    feature_size: int
    dropout_rate: float
    survival_prob: float | None
    num_classes: int = 1000
    activation: str = "silu"
    survival_fn: SurvivalFunction = linear_survival
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-3
    bn_group_size: int = 0
    bn_unbiased: bool = True
    bn_two_pass: bool = False
    head_bias: float = 0.0
    initializer: str = "official"
    padding: str = "SAME"
    remat: bool = False
    remat_fused: bool = True
    remat_norms: bool = False
    lowering: str = "auto"
    axis_name: str | None = None
    channel_parallel: int = 1
    freeze: str = ""
    dtype: Any = jnp.float32

    @property
    def block_specs(self) -> tuple[BlockSpec, ...]:
        """One entry per block, scaled."""
        return expand_blocks(self.blocks, width=self.width, depth=self.depth)

    def channel_parallel_blocks(self, images: Sequence[int]) -> range:
        """Returns which blocks `channel_parallel` divides: the last ones that are wide enough.

        What devices exchange for a block grows with its kernels where they divide the images, with
        its output where they divide the channels: it is wide if that has few pixels for its
        channels.

        Args:
          images: shape of the global batch, [N, H, W, 3].
        """
        specs, devices = self.block_specs, self.channel_parallel
        limit = lowering.choose(self.lowering).channel_parallel_pixels

        def is_wide(spec: BlockSpec, pixels: int) -> bool:
            divisible = spec.expands and not spec.fused and spec.inner_channels % devices == 0
            return divisible and pixels <= limit * spec.inner_channels

        pixels = [images[0] * each for each in self.input_pixels(images[1:3])]
        first = len(specs)
        while devices > 1 and first and is_wide(specs[first - 1], pixels[first + 1]):
            first -= 1
        return range(first, len(specs))

    def input_pixels(self, size: Sequence[int]) -> list[int]:
        """Returns the pixels of what stem, blocks and head get, of one image of this size."""
        pixels = []
        for stride in (2, *(spec.stride for spec in self.block_specs), 1):
            pixels.append(math.prod(size))
            size = [-(-side // stride) for side in size]
        return pixels

    @property
    def map_dtype(self) -> jnp.dtype:
        """Type of the maps between the convolutions, see `lowering.Lowering`."""
        return lowering.choose(self.lowering).map_type(jnp.dtype(self.dtype))

    def result_dtype(self, train: bool) -> jnp.dtype:
        """Type of what convolutions give to norms, see `lowering.Lowering`."""
        if train:
            return self.map_dtype
        return lowering.choose(self.lowering).result_type(jnp.dtype(self.dtype))

    @property
    def stem_channels(self) -> int:
        """Channels of the stem: those that enter the first block."""
        return self.block_specs[0].in_channels

    @property
    def head_channels(self) -> int:
        """Channels of the head, the number of pooled features."""
        return round_channels(self.feature_size, self.width)

    @nn.compact
    def __call__(
        self,
        images: Array,
        train: bool = False,
        *,
        dropout_rate: Rate = None,
        survival_prob: Rate = None,
        endpoints: bool = False,
        only: range | None = None,
    ) -> Array | tuple[Array, dict[str, Array]]:
        """Applies the network.

        Args:
          images: [N, H, W, 3], normalised.
          train: norms use the batch's statistics; dropout and drop path are on (rngs={"dropout":
            key}, the same key on every device; noise is drawn per example by its position in the
            global batch).
          dropout_rate: instead of the model's; may be traced. Used in training only.
          survival_prob: of the last block, instead of the model's; may be traced. 0 or 1: off.
          endpoints: also return the inner tensors.
          only: the layers to apply, to what the layer before them gave: the stem is 0, the
            blocks follow, the head with all behind it is the last. None: all.

        Returns:
          logits [N, num_classes] float32, or with num_classes=0 pooled features [N, head_channels]
          float32. With endpoints=True a pair of these and a dict by official names: stem, block_0,
          block_0/expansion_output, ..., reduction_1..5, features, head_1x1, pooled_features, head.

        Raises:
          ValueError: endpoints are asked for in training with `channel_parallel`, where those of
            the last blocks are parts.
        """
        chex.assert_rank(images, 4)
        divided = range(0)
        if train:
            everywhere = images.shape[0] * self.channel_parallel
            divided = self.channel_parallel_blocks((everywhere, *images.shape[1:]))
        if divided and endpoints:
            raise ValueError("endpoints=True with channel_parallel > 1 in training: set it to 1")
        dropout_rate = self.dropout_rate if dropout_rate is None else dropout_rate
        survival_prob = self.survival_prob if survival_prob is None else survival_prob
        specs = self.block_specs
        path_noise, dropout_noise = self._noise(
            images.shape[0],
            paths=len(specs) if train and not _is_static(survival_prob, (None, 0, 1)) else 0,
            features=self.head_channels if train and not _is_static(dropout_rate, (None, 0)) else 0,
        )
        parts, divided_parts = self._parts(train), self._parts(train, divided=True)
        ends = {}

        outer = {key: parts[key] for key in ("conv", "norm", "activation")}
        x = images
        only = range(len(specs) + 2) if only is None else only
        if 0 in only:
            stem = block_modules.Stem(self.stem_channels, name="stem", **outer)
            x = stem(x.astype(self.map_dtype), train)
            ends["stem"] = x

        reductions = 0
        for i, spec in enumerate(specs):
            if i + 1 not in only:
                continue
            if i in divided[:1]:
                x, path_noise = self._of_all_devices((x, path_noise))
            cls = block_modules.FusedMBConv if spec.fused else block_modules.MBConv
            survival, noise = None, None
            if path_noise is not None and spec.has_residual:
                survival, noise = self._survival(i, survival_prob), path_noise[:, i]
            own = divided_parts if i in divided else parts
            block = cls(spec=spec, name=f"blocks_{i}", **own)
            again = self.remat and (self.remat_fused or not spec.fused)
            if again and not self.is_initializing():
                x, expansion = recomputed(
                    block, x, survival, noise, train=train, implementation=self.lowering
                )
            else:
                x, expansion = block(x, train, survival, noise)
            if i in divided[-1:]:
                x = self._of_this_device(x)
            names = [f"block_{i}"]
            if i + 1 == len(specs) or specs[i + 1].stride > 1:
                reductions += 1
                names.append(f"reduction_{reductions}")
            for name in names:
                ends[name] = x
                ends[f"{name}/expansion_output"] = expansion
        ends["features"] = x
        if len(specs) + 1 not in only:
            return (x, ends) if endpoints else x

        head = block_modules.Head(self.head_channels, name="head", **outer)
        x = head(x, train)
        ends["head_1x1"] = x
        x = jnp.mean(x, (1, 2), dtype=jnp.float32)
        ends["pooled_features"] = x
        if dropout_noise is not None:
            x = layers.dropout(x, dropout_rate, dropout_noise)
        ends["head"] = x
        if self.num_classes:
            x = layers.Classifier(
                self.num_classes, self.head_bias, self.initializer, name="classifier"
            )(x)
        return (x, ends) if endpoints else x

    def _of_all_devices(self, tree: Any) -> Any:
        """The values of all images, in their order, from those of each device's images."""
        if self.is_initializing():
            return tree
        return lax.all_gather(tree, self.axis_name, tiled=True)

    def _of_this_device(self, x: Array) -> Array:
        """The values of this device's images."""
        if self.is_initializing():
            return x
        count = x.shape[0] // self.channel_parallel
        return lax.dynamic_slice_in_dim(x, lax.axis_index(self.axis_name) * count, count)

    def _parts(self, train: bool, *, divided: bool = False) -> dict[str, Any]:
        """The layers all blocks are made of, with what is common to them stated once.

        Args:
          train: as of the call.
          divided: for blocks whose inner channels the devices divide. No norm there needs another
            device, as each has all images. A device's gradient is a part of the sum, as elsewhere,
            for variables that all devices hold; for those of its own channels it is the whole.
        """
        conv = {
            "padding": self.padding,
            "dtype": self.result_dtype(train),
            "product_dtype": self.dtype,
            "implementation": self.lowering,
            "initializer": self.initializer,
        }
        return {
            "conv": functools.partial(layers.Conv, **conv),
            "depthwise": functools.partial(layers.DepthwiseConv, **conv),
            "norm": functools.partial(
                BatchNorm,
                momentum=self.bn_momentum,
                epsilon=self.bn_epsilon,
                unbiased=self.bn_unbiased,
                group_size=self.bn_group_size,
                two_pass=self.bn_two_pass,
                axis_name=None if divided else self.axis_name,
                implementation=self.lowering,
                freeze=self.freeze,
                dtype=self.map_dtype,
            ),
            "activation": layers.get_activation(self.activation),
            "implementation": self.lowering,
            "remat_norms": self.remat_norms,
            "divide_by": self.channel_parallel if divided else 1,
            "sum_over": self.axis_name if divided else None,
        }

    def _survival(self, index: int, survival_prob: float | Array) -> float | Array:
        """Survival probability of a block; a traced 0 switches drop path off like a static one."""
        prob = self.survival_fn(index, len(self.block_specs), survival_prob)
        return jnp.where(jnp.asarray(survival_prob) > 0, prob, 1.0)

    def _noise(
        self, examples: int, *, paths: int, features: int
    ) -> tuple[Array | None, Array | None]:
        """Draws all noise of the call at once: [N, paths] in `dtype`, [N, features] float32."""
        if not paths and not features:
            return None, None
        axis_name = None if self.is_initializing() else self.axis_name
        keys = layers.example_keys(self.make_rng("dropout"), examples, axis_name=axis_name)

        def draw(stream: int, count: int, dtype: Any) -> Array | None:
            if not count:
                return None
            return jax.vmap(
                lambda key: jax.random.uniform(jax.random.fold_in(key, stream), (count,), dtype)
            )(keys)

        return draw(0, paths, self.dtype), draw(1, features, jnp.float32)


def _is_static(value: Rate, values: tuple) -> bool:
    """Whether the value is known while tracing and one of `values`."""
    return not isinstance(value, jax.Array) and value in values


_OVERRIDES = tuple(
    field.name
    for field in dataclasses.fields(EfficientNet)
    if field.name not in ("variant", "num_classes", "dtype", "parent", "name")
)


def create_model(
    name: str,
    num_classes: int = 1000,
    *,
    dtype: Any = jnp.float32,
    **overrides: Any,
) -> EfficientNet:
    """Makes a network by name.

    Args:
      name: see `effv2_jax.list_models()`; also "testing", a tiny one.
      num_classes: outputs; 0: pooled features.
      dtype: compute type, jnp.float32 or jnp.bfloat16.
      **overrides: attributes of `EfficientNet` that differ from the variant's: width, depth,
        blocks (`BlockSpec`s or official strings such as "r2_k3_s1_e1_i24_o24_c1"), activation,
        dropout_rate, survival_prob, remat, ... None and an empty `blocks` mean the variant's.

    Raises:
      UserError: unknown name, override or value.
    """
    variant = get_variant(name)
    for key in overrides:
        if key not in _OVERRIDES:
            near = difflib.get_close_matches(key, _OVERRIDES, n=1, cutoff=0.0)[0]
            raise UserError(
                f"create_model: unknown override {key!r}: did you mean {near!r}? "
                f"Valid: {', '.join(_OVERRIDES)}"
            )
    fields = {
        "blocks": variant.blocks,
        "width": variant.width,
        "depth": variant.depth,
        "feature_size": variant.feature_size,
        "dropout_rate": variant.dropout_rate,
        "survival_prob": variant.survival_prob,
        "bn_epsilon": variant.bn_epsilon,
        "padding": variant.padding,
    }
    fields |= {key: value for key, value in overrides.items() if value is not None}
    fields["blocks"] = parse_blocks(fields["blocks"]) or variant.blocks
    model = EfficientNet(variant=name, num_classes=num_classes, dtype=jnp.dtype(dtype), **fields)
    _check(model)
    return model


def _check(model: EfficientNet) -> None:
    """Raises UserError for values that no network can have."""
    layers.get_activation(model.activation)
    _ = model.block_specs
    for key, low, high in (
        ("num_classes", 0, None),
        ("width", 1e-3, None),
        ("depth", 1e-3, None),
        ("feature_size", 1, None),
        ("dropout_rate", 0, 0.999),
        ("survival_prob", 0, 1),
        ("bn_momentum", 0, 1),
        ("bn_epsilon", 0, None),
        ("bn_group_size", 0, None),
        ("channel_parallel", 1, None),
    ):
        value = getattr(model, key)
        if value < low or (high is not None and value > high):
            bound = f"between {low} and {high}" if high is not None else f"at least {low}"
            raise UserError(f"model.{key} is {value}; expected {bound}")
    for key, valid in (
        ("padding", layers.PADDINGS),
        ("lowering", lowering.IMPLEMENTATIONS),
        ("initializer", layers.INITIALIZERS),
    ):
        value = getattr(model, key)
        if value not in valid:
            raise UserError(f"model.{key} is {value!r}; expected one of {', '.join(valid)}")
