"""The forward pass in TensorFlow, from a checkpoint's own variables: an independent opinion.

Plain tf.nn operations under the official names, and TensorFlow's own reader of checkpoints; neither
our network, nor our reader of the values, nor our table of a block's names is used.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from effv2_jax.convert import checkpoint_files
from effv2_jax.convert.checkpoint_files import CheckpointFiles
from effv2_jax.convert.conversion import Conversion, Forward
from effv2_jax.convert.tensor_bundle import Bundle
from effv2_jax.convert.tf_checkpoint import tensor_keys
from effv2_jax.errors import UserError
from effv2_jax.models.block_spec import BlockSpec

_EPSILON = 1e-3

# official name without the model's -> value
Lookup = Callable[[str], Any]


def forward(path: str | Path) -> Forward:
    """Returns the forward pass of a checkpoint, for `conversion.command`.

    Args:
      path: as of `tf_checkpoint.convert`.

    Raises:
      UserError: TensorFlow is not installed.
    """
    # No notes about the processor; JAX has set it to 1.
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
        import tensorflow as tf
    except ImportError as error:
        raise UserError(
            f"--check-parity needs TensorFlow ({error}): pip install tensorflow, or leave the flag "
            "out"
        ) from None

    def run(conversion: Conversion, images: np.ndarray) -> np.ndarray:
        files = checkpoint_files.find(path)
        keys = tensor_keys(Bundle(files), ema=conversion.info["source"]["weights"])
        with _on_disk(files) as prefix:
            reader = tf.train.load_checkpoint(prefix)
            return _logits(tf, lambda name: reader.get_tensor(keys[name]), conversion, images)

    return run


@contextlib.contextmanager
def _on_disk(files: CheckpointFiles) -> Iterator[str]:
    """Yields a prefix that TensorFlow can read; an archive is unpacked for the while."""
    if files.hashed[0].name.endswith(".index"):
        yield files.where
        return
    with tempfile.TemporaryDirectory() as folder:
        prefix = f"{folder}/model"
        Path(f"{prefix}.index").write_bytes(files.index)
        count = Bundle(files).num_shards
        for i in range(count):
            extent = files.shard(i, count)
            extent.file.seek(extent.start)
            with open(f"{prefix}.data-{i:05d}-of-{count:05d}", "wb") as file:
                shutil.copyfileobj(extent.file, file, 1 << 20)
                file.truncate(extent.size)
        yield prefix


def _logits(tf: Any, get: Lookup, conversion: Conversion, images: np.ndarray) -> np.ndarray:
    """The network of effnetv2_model.py in inference."""
    model = conversion.model
    if model.activation not in ("", "silu", "swish"):
        raise UserError(f"--check-parity knows silu networks only, not {model.activation}")

    def norm(x: Any, name: str) -> Any:
        mean, variance, beta, gamma = (
            get(f"{name}/{leaf}") for leaf in ("moving_mean", "moving_variance", "beta", "gamma")
        )
        return tf.nn.batch_normalization(x, mean, variance, beta, gamma, _EPSILON)

    def conv(x: Any, name: str, stride: int = 1) -> Any:
        return tf.nn.conv2d(x, get(f"{name}/kernel"), stride, "SAME")

    x = tf.constant(images)
    x = tf.nn.silu(norm(conv(x, "stem/conv2d", 2), "stem/tpu_batch_normalization"))
    for i, spec in enumerate(model.block_specs):
        x = _block(tf, get, x, f"blocks_{i}", spec, conv, norm)
    x = tf.nn.silu(norm(conv(x, "head/conv2d"), "head/tpu_batch_normalization"))
    x = tf.reduce_mean(x, (1, 2))
    if model.num_classes:
        x = tf.matmul(x, get("head/dense/kernel")) + get("head/dense/bias")
    return x.numpy()


def _block(
    tf: Any, get: Lookup, x: Any, module: str, spec: BlockSpec, conv: Callable, norm: Callable
) -> Any:
    """One MBConv or FusedMBConv; layers of a kind are numbered in the order of their use."""
    used: dict[str, int] = {}

    def next_name(kind: str) -> str:
        count = used.get(kind, 0)
        used[kind] = count + 1
        return f"{module}/{kind}_{count}" if count else f"{module}/{kind}"

    def apply(y: Any, stride: int = 1) -> Any:
        return norm(conv(y, next_name("conv2d"), stride), next_name("tpu_batch_normalization"))

    y, stride = x, spec.stride
    if spec.expand > 1:
        y = tf.nn.silu(apply(y, stride if spec.fused else 1))
    if not spec.fused:
        kernel = get(f"{module}/depthwise_conv2d/depthwise_kernel")
        y = tf.nn.depthwise_conv2d(y, kernel, (1, stride, stride, 1), "SAME")
        y = tf.nn.silu(norm(y, next_name("tpu_batch_normalization")))
    if spec.se:
        gate = tf.reduce_mean(y, (1, 2), keepdims=True)
        gate = conv(gate, f"{module}/se/conv2d") + get(f"{module}/se/conv2d/bias")
        gate = conv(tf.nn.silu(gate), f"{module}/se/conv2d_1") + get(f"{module}/se/conv2d_1/bias")
        y = y * tf.sigmoid(gate)
    if spec.fused and spec.expand == 1:
        y = tf.nn.silu(apply(y, stride))
    else:
        y = apply(y)
    return x + y if stride == 1 and x.shape[-1] == y.shape[-1] else y
