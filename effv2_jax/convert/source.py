"""What a network of another framework is in terms of ours, and how its state dict is converted."""

import dataclasses
import difflib
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from effv2_jax.convert.conversion import Conversion, Forward, command, default_info, sha256_of
from effv2_jax.convert.mapping import TensorName, to_variables
from effv2_jax.convert.torch_weights import TorchWeights, read_torch_weights
from effv2_jax.errors import UserError
from effv2_jax.models.network import EfficientNet, create_model
from effv2_jax.models.summary import summarize, totals
from effv2_jax.models.variants import RELEASED_V1_B3, get_variant


@dataclasses.dataclass(frozen=True)
class Source:
    """A network of another framework.

    Attributes:
      name: theirs.
      model: ours.
      image_size: px, at which its weights are evaluated.
      preprocessing: kind of data/kinds.py.
      overrides: of `create_model`, where it differs from ours.
    """

    name: str
    model: str
    image_size: int
    preprocessing: str
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def released_blocks(model: str) -> dict[str, Any]:
    """The override that makes V1-B3 what every other framework calls B3; {} for all others."""
    return {"blocks": RELEASED_V1_B3} if model == "efficientnet-b3" else {}


def find_source(name: str, sources: Sequence[Source]) -> Source:
    """Returns the network of that name, theirs (with or without a tag) or ours; the first of many.

    Raises:
      UserError: the framework has none.
    """
    for source in sources:
        if name in (source.name, source.name.split(".")[0], source.model):
            return source
    names = list(dict.fromkeys(source.name.split(".")[0] for source in sources))
    known = [*names, *(source.name for source in sources), *(source.model for source in sources)]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    raise UserError(f"--model {name}: did you mean {near}? Known: {', '.join(names)}")


def source_per_network(sources: Sequence[Source]) -> list[Source]:
    """Returns the first source of every network, the networks with few multiply-adds first."""
    seen: dict[str, Source] = {}
    for source in sources:
        seen.setdefault(source.model, source)

    def multiply_adds(source: Source) -> int:
        return totals(summarize(get_variant(source.model), image_size=128))[-1]

    return sorted(seen.values(), key=multiply_adds)


def resolve(
    model: str | EfficientNet, num_classes: int, sources: Sequence[Source]
) -> tuple[EfficientNet, int | None, str | None]:
    """Returns the network with so many classes, its image size and its preprocessing.

    Args:
      model: a name, theirs or ours, or a network of other sizes; of that, size and preprocessing
        are unknown: None.
      num_classes: of the weights.
      sources: the framework's networks.
    """
    if isinstance(model, EfficientNet):
        return model.clone(num_classes=num_classes), None, None
    source = find_source(model, sources)
    network = create_model(source.model, num_classes, **source.overrides)
    return network, source.image_size, source.preprocessing


def check_classes(found: int, expected: int | None, *, where: str | Path) -> None:
    """Raises UserError where a file has not the expected number of classes."""
    if expected is not None and found != expected:
        raise UserError(
            f"{where}: has {found} classes, --num-classes says {expected}: leave it out, or set it "
            f"to {found} (a new classifier is made where the weights are used, not here)"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchConverter:
    """Converts state dicts of a framework that PyTorch's files come from.

    Attributes:
      framework: for the weights file's header.
      sources: the framework's networks.
      names: the table of names of a network.
      classifier: name of the layer; its bias says how many classes there are.
    """

    framework: str
    sources: Sequence[Source]
    names: Callable[[EfficientNet], Sequence[TensorName]]
    classifier: str

    def __call__(
        self,
        path: str | Path,
        *,
        model: str | EfficientNet,
        num_classes: int | None = None,
        key: str | None = None,
    ) -> Conversion:
        """Converts a state dict.

        Args:
          path: a .pth, .bin or .safetensors file.
          model: the framework's name, with the tag of the weights if it has such (it says how
            images are made) or without (then that of its default weights), or ours, or a network of
            other sizes.
          num_classes: expected; None: as many as the file has.
          key: part of a training checkpoint, see `read_torch_weights`.

        Raises:
          UserError: not readable, or not the weights of that network.
        """
        start = time.monotonic()
        if isinstance(model, str):
            find_source(model, self.sources)  # a wrong name is told before anything is read
        weights = read_torch_weights(path, key=key)
        found = _classes(weights, self.classifier)
        check_classes(found, num_classes, where=path)
        network, image_size, preprocessing = resolve(model, found, self.sources)
        variables = to_variables(weights.tensors, self.names(network), network, where=str(path))
        info = default_info(
            network.variant,
            framework=self.framework,
            file=path,
            sha256=sha256_of(path),
            num_classes=found,
            weights=weights.weights,
            image_size=image_size,
            preprocessing=preprocessing,
        )
        return Conversion(
            model=network,
            variables=variables,
            info=info,
            num_read=weights.num_read,
            left_out=weights.left_out,
            notes=weights.notes,
            seconds=time.monotonic() - start,
        )


def framework_command(
    arguments: Sequence[str],
    *,
    description: str,
    names: ModuleType,
    forward: Callable[[str], Forward],
    flags: Mapping[str, Mapping[str, Any]] | None = None,
) -> int:
    """Runs the command of a framework's converter, see `conversion.command`.

    Args:
      arguments: without the command's name.
      description: for --help.
      names: the module names_*.py of the framework: its `convert` and its `SOURCES`.
      forward: for --check-parity.
      flags: more flags.
    """
    return command(
        arguments,
        description=description,
        convert=names.convert,
        forward=forward,
        flags=flags,
        known_model=functools.partial(find_source, sources=names.SOURCES),
    )


def _classes(weights: TorchWeights, classifier: str) -> int:
    """Number of outputs; 0: the file has no classifier."""
    name = f"{classifier}.bias"
    return weights.tensors[name].size if name in weights.tensors else 0
