"""Weights files of tiny networks that were never trained but decide."""

import numpy as np

from effv2_jax.convert.weights_file import save_weights
from effv2_jax.data.kinds import describe
from effv2_jax.models.network import create_model, init_variables

BLOCKS = ("r1_k3_s2_e1_i8_o8_c1",)
SIZE = 24


def network(outputs=3, **overrides):
    """A network of one block and its variables, with a classifier of large numbers."""
    model = create_model("testing", outputs, blocks=BLOCKS, **overrides)
    variables = init_variables(model, 3)
    kernel = variables["params"]["classifier"]["kernel"]
    variables["params"]["classifier"]["kernel"] = (
        20 * np.random.default_rng(0).normal(size=kernel.shape)
    ).astype(np.float32)
    return model, variables


def write_weights(path, *, labels=("ant", "bee", "cat"), outputs=3, kind="v2", loss=None):
    """Writes them; returns the path as text."""
    info = {
        "image_size": SIZE,
        "preprocessing": None if kind is None else describe(kind, SIZE),
        "labels": labels,
        "source": None if loss is None else {"framework": "effv2_jax", "loss": loss},
    }
    save_weights(path, *network(outputs), info)
    return str(path)
