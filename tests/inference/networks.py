"""Weights files of tiny networks that were never trained but decide."""

import numpy as np

from effv2_jax.convert.weights_file import save_weights
from effv2_jax.data.kinds import describe
from effv2_jax.models.initial_variables import init_variables
from effv2_jax.models.network import create_model

BLOCKS = ("r1_k3_s2_e1_i8_o8_c1",)
SIZE = 24


def network(outputs=3, **overrides):
    """A network of one block and its variables, with a classifier of large numbers."""
    model = create_model("testing", outputs, blocks=BLOCKS, **overrides)
    variables = init_variables(model, 3)
    if outputs:
        kernel = np.random.default_rng(0).normal(size=(model.head_channels, outputs))
        variables["params"]["classifier"]["kernel"] = (20 * kernel).astype(np.float32)
    return model, variables


def write_weights(path, *, labels=("ant", "bee", "cat"), outputs=None, kind="v2", loss=None):
    """Writes them; returns the path as text.

    Args:
      path: of the file.
      labels: names of the classes, or None.
      outputs: of the network; None: as many as there are labels.
      kind: of preprocessing; None: not told.
      loss: they were trained with, as the file says; None: not told.
    """
    info = {
        "image_size": SIZE,
        "preprocessing": None if kind is None else describe(kind, SIZE),
        "labels": labels,
        "source": None if loss is None else {"framework": "effv2_jax", "loss": loss},
    }
    save_weights(path, *network(len(labels) if outputs is None else outputs), info)
    return str(path)
