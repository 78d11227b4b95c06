"""The peers this project is measured against: packages, workers, names of the networks there."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import contest
from effv2_jax.errors import UserError
from effv2_jax.startup import ALLOCATOR_VARIABLES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer:
    """One peer.

    Attributes:
        worker: file in workers/.
        modules: that its interpreter must have -> the package to install.
        networks: our prefix of a network's name -> the peer's prefix and the endings it has.
        underscores: whether names have "_" where ours have "-".
        upper: whether endings are upper case.
        environment: of its process.
    """

    worker: str
    modules: Mapping[str, str]
    networks: Mapping[str, tuple[str, tuple[str, ...]]]
    underscores: bool = True
    upper: bool = False
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def network(self, model: str) -> str | None:
        """The peer's name of one of our networks, None where it has none."""
        for ours, (theirs, endings) in self.networks.items():
            ending = model.removeprefix(ours)
            if model.startswith(ours) and ending in endings:
                ending = ending.replace("-", "_") if self.underscores else ending
                return theirs + (ending.upper() if self.upper else ending)
        return None


_V2 = ("b0", "b1", "b2", "b3", "s", "m", "l")
_V1 = tuple(f"b{number}" for number in range(8))
_KERAS = {"efficientnetv2-": ("EfficientNetV2", _V2), "efficientnet-": ("EfficientNet", _V1)}
_KERAS_WORKER = {"worker": "keras_worker.py", "networks": _KERAS, "upper": True}

PEERS = {
    "timm": Peer(
        worker="torch_worker.py",
        modules={"torch": "torch", "timm": "timm"},
        networks={
            "efficientnetv2-": ("tf_efficientnetv2_", (*_V2, "xl")),
            "efficientnetv2-rw-": ("efficientnetv2_rw_", ("t", "s", "m")),
            "efficientnet-": ("tf_efficientnet_", (*_V1, "b8", "l2")),
        },
    ),
    "torchvision": Peer(
        worker="torch_worker.py",
        modules={"torch": "torch", "torchvision": "torchvision"},
        networks={
            "efficientnetv2-": ("efficientnet_v2_", ("s", "m", "l")),
            "efficientnet-": ("efficientnet_", _V1),
        },
    ),
    "keras-jax": Peer(
        **_KERAS_WORKER,
        modules={"keras": "keras", "jax": "jax"},
        environment={"KERAS_BACKEND": "jax"},
    ),
    "keras-tf": Peer(
        **_KERAS_WORKER,
        modules={"keras": "keras", "tensorflow": "tensorflow"},
        environment={"KERAS_BACKEND": "tensorflow", "TF_ENABLE_ONEDNN_OPTS": "1"},
    ),
}

COMPILE = ("auto", "on", "off")


def interpreters(text: str, peers: Sequence[str]) -> dict[str, str]:
    """Reads --peer-python: a path for all peers, or timm=PATH,keras-tf=PATH.

    Raises:
        UserError: a peer is named that does not take part.
    """
    if not text:
        return dict.fromkeys(peers, sys.executable)
    if "=" not in text:
        return dict.fromkeys(peers, text)
    found = dict.fromkeys(peers, sys.executable)
    for part in text.split(","):
        name, _, path = part.partition("=")
        if name not in found or not path:
            raise UserError(
                f"--peer-python: found {part!r}; expected PEER=PATH with one of {', '.join(peers)}"
            )
        found[name] = path
    return found


def check(names: Sequence[str], models: Sequence[str], pythons: Mapping[str, str]) -> None:
    """Refuses what could not be measured, before anything is.

    Raises:
        UserError: an unknown peer, a network it does not have, a package that is not installed.
    """
    for name in names:
        if name not in PEERS:
            raise UserError(f"--peer: found {name!r}; expected {', '.join(PEERS)}")
        for model in models:
            if PEERS[name].network(model) is None:
                raise UserError(f"--peer {name}: it has no {model}; leave out the one or the other")
        modules = PEERS[name].modules
        if lacking := contest.missing(pythons[name], list(modules)):
            packages = " ".join(modules[module] for module in lacking)
            raise UserError(
                f"--peer {name}: {pythons[name]} has no {', '.join(lacking)}; pip install "
                f"{packages} there, or name an interpreter that has it with --peer-python"
            )


def contestant(
    name: str, *, python: str, task: Mapping[str, Any], threads: int
) -> contest.Contestant:
    """Returns a peer as it takes part in a contest.

    Args:
        name: of the peer.
        python: its interpreter.
        task: what all contestants are told.
        threads: as many as cores.
    """
    peer = PEERS[name]
    on_jax = "jax" in peer.modules
    return contest.Contestant(
        name=name,
        command=contest.start(peer.worker, python),
        task={**task, "peer": name, "peer_model": peer.network(task["model"]), "threads": threads},
        environment={**peer.environment, "OMP_NUM_THREADS": str(threads)},
        # TensorFlow ends at XLA flags it does not know.
        inherits=(*ALLOCATOR_VARIABLES, *(("XLA_FLAGS",) if on_jax else ())),
        one_arena=on_jax,
        asked={"compile": task["compile"]},
    )
