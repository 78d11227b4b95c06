"""The other frameworks' own networks with converted weights, where they are installed.

For --check-parity, tools/convert_parity.py and the tests: the source's tensors, under its names, go
into its own network and a forward pass runs there. Nothing of this is needed to convert.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from effv2_jax.convert import names_keras, names_timm, names_torchvision
from effv2_jax.convert.comparison import expected, nest
from effv2_jax.convert.conversion import Conversion, Forward, default_info
from effv2_jax.convert.mapping import from_variables
from effv2_jax.convert.source import Source
from effv2_jax.errors import UserError
from effv2_jax.models.network import create_model

_RANDOM_SIZE = 128  # px: every padding of a stride shows, and the largest networks fit in memory
_COUNTER = "num_batches_tracked"  # PyTorch sets it itself where a state dict lacks it


def random_conversion(source: Source) -> Conversion:
    """Returns a network with random weights as if converted, for comparisons without a file.

    No bias, scale or statistic is 0 or 1, so that none can be left out unnoticed.

    Args:
      source: which network.
    """
    model = create_model(source.model, 1000, **source.overrides)
    rng = np.random.default_rng(0)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name in ("scale", "var"):
            return rng.uniform(0.6, 1.4, shape).astype(np.float32)
        if name == "kernel":  # fan-in: activations neither grow nor vanish
            value = rng.standard_normal(shape, np.float32)
            return value / np.float32(math.sqrt(math.prod(shape[:-1])))
        return rng.normal(0, 0.1, shape).astype(np.float32)

    tensors = {path: draw(path.split("/")[-1], shape)
               for path, (_, shape) in expected(model).items()}  # fmt: skip
    info = default_info(
        source.model, framework="random", file="none", sha256=None, image_size=_RANDOM_SIZE
    )
    return Conversion(
        model=model,
        variables=nest(tensors),
        info=info,
        num_read=len(tensors),
        left_out={},
        seconds=0.0,
    )


def timm_forward(_: str) -> Forward:
    """Returns the forward pass of timm's network of the same architecture."""
    timm = _imported("timm")

    def forward(conversion: Conversion, images: np.ndarray) -> np.ndarray:
        model = conversion.model
        name = names_timm.timm_name(model)
        if name is None:
            raise UserError(f"--check-parity: timm has no network like this {model.variant}")
        network = timm.create_model(name, num_classes=model.num_classes)
        state = from_variables(conversion.variables, names_timm.tensor_names(model))
        return _torch_logits(network, state, images)

    return forward


def torchvision_forward(_: str) -> Forward:
    """Returns the forward pass of torchvision's network of the same name."""
    models = _imported("torchvision").models

    def forward(conversion: Conversion, images: np.ndarray) -> np.ndarray:
        model = conversion.model
        (name,) = (s.name for s in names_torchvision.SOURCES if s.model == model.variant)
        network = models.get_model(name, weights=None, num_classes=model.num_classes)
        state = from_variables(conversion.variables, names_torchvision.tensor_names(model))
        return _torch_logits(network, state, images)

    return forward


def keras_forward(_: str) -> Forward:
    """Returns the forward pass of keras.applications' network of the same name.

    Its layers that normalise images have no part in it: V2's are left out, V1's (which cannot be)
    are undone.
    """
    keras = _imported("keras")

    def forward(conversion: Conversion, images: np.ndarray) -> np.ndarray:
        model = conversion.model
        (name,) = (s.name for s in names_keras.SOURCES if s.model == model.variant)
        options = {"include_preprocessing": False} if "V2" in name else {}
        network = getattr(keras.applications, name)(
            weights=None,
            input_shape=images.shape[1:],
            include_top=bool(model.num_classes),
            pooling="avg",
            classes=model.num_classes or 1000,
            classifier_activation=None,
            **options,
        )
        values = from_variables(conversion.variables, names_keras.tensor_names(model))
        for layer in network.layers:
            for weight in layer.weights:
                key = f"{layer.name}/{weight.name}"
                if not layer.name.startswith("normalization") and weight.name != "seed_generator":
                    weight.assign(values.pop(key))
        if values:
            raise ValueError(f"keras has no {', '.join(values)}")
        # A fresh Normalization does nothing; the Rescaling before it divides by 255.
        inputs = images if options else images * 255
        return np.asarray(network(inputs, training=False))

    return forward


def _imported(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise UserError(
            f"--check-parity needs {name} ({error}): pip install {name}, or leave the flag out"
        ) from None


def _torch_logits(network: Any, state: Mapping[str, np.ndarray], images: np.ndarray) -> np.ndarray:
    import torch

    tensors = {name: torch.from_numpy(np.array(tensor)) for name, tensor in state.items()}
    missing, unexpected = network.load_state_dict(tensors, strict=False)
    missing = [name for name in missing if not name.endswith(_COUNTER)]
    if missing or unexpected:
        raise ValueError(f"missing {missing}, unexpected {unexpected}")
    with torch.no_grad():
        inputs = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        return network.eval()(inputs).numpy()
