"""Prints how far converted networks are from those of their frameworks, as a Markdown table.

    python tools/convert_parity.py timm [NAME ...]     the same for torchvision and keras: random
                                                       weights in their network and in ours
    python tools/convert_parity.py official [NAME ...] checkpoints of the reference's weights
    python tools/convert_parity.py checkpoints         those of TensorFlow, whole and damaged

Run from the root of the repository; timm, torchvision or Keras must be installed for their tables.
Deviations are the largest difference of the logits, relative to their standard deviation; of
`official` also its root mean square. L2 takes 10 GB of memory.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from effv2_jax.command import Parser, exit_code
from effv2_jax.convert import names_keras, names_timm, names_torchvision, peers, tf_checkpoint
from effv2_jax.convert.conversion import Conversion, parity
from effv2_jax.convert.source import find_source, source_per_network
from effv2_jax.errors import UserError
from effv2_jax.models.variants import get_variant
from tests import reference
from tests.convert import checkpoints

_PEERS = {
    "timm": (names_timm, peers.timm_forward),
    "torchvision": (names_torchvision, peers.torchvision_forward),
    "keras": (names_keras, peers.keras_forward),
}
_SEED = 700  # of the images behind the logits of the stored checkpoints


def _peer_rows(framework: str, names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Random weights in the framework's network and in ours."""
    yield "network", "ours", "parameters", "deviation", "s"
    module, forward = _PEERS[framework]
    sources = source_per_network(module.SOURCES)
    if names:
        sources = [find_source(name, sources) for name in names]
    for source in sources:
        start = time.monotonic()
        conversion = peers.random_conversion(source)
        deviation = parity(conversion, forward(""))
        count = sum(np.size(leaf) for leaf in jax.tree.leaves(conversion.variables["params"]))
        seconds = f"{time.monotonic() - start:.0f}"
        yield source.name.split(".")[0], source.model, f"{count:,}", f"{deviation:.1e}", seconds
        jax.clear_caches()


def _official_rows(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The reference's weights, written as a checkpoint, as raw variables and as averages."""
    yield "network", "read", "mapped", "raw, rms", "raw, largest", "ema, rms", "ema, largest", "s"
    for name in names or reference.load_json("models.json"):
        get_variant(name)
        start, cells = time.monotonic(), []
        for weights in ("raw", "ema"):
            with tempfile.TemporaryDirectory() as folder:
                prefix = Path(folder, "model")
                checkpoints.write_released(name, prefix, weights=weights)
                conversion = tf_checkpoint.convert(prefix, model=name, ema=weights)
            stored = reference.model_logits(name)["square_logits"]
            logits = _logits(conversion, reference.model_input(name, "square"))
            rms = reference.logits_deviation(logits, stored)
            cells += [f"{rms:.1e}", f"{_largest(logits, stored):.1e}"]
        mapped = len(jax.tree.leaves(conversion.variables))
        seconds = f"{time.monotonic() - start:.0f}"
        yield name, str(conversion.num_read), str(mapped), *cells, seconds
        jax.clear_caches()


def _checkpoint_rows() -> Iterator[tuple[str, ...]]:
    """The checkpoints that TensorFlow wrote."""
    yield "checkpoint", "read", "auto", "left out", "raw", "ema"
    images = reference.image(32, 32, 8, _SEED)
    logits = reference.load_npz("checkpoints/logits.npz")
    damaged = sorted(path.name for path in checkpoints.FOLDER.glob("damaged_*"))
    for name in (*checkpoints.WHOLE, *damaged):
        path, network = checkpoints.FOLDER / name, checkpoints.network()
        try:
            conversion = tf_checkpoint.convert(path, model=network)
        except UserError as error:
            told = str(error).replace(f"{checkpoints.FOLDER}{os.sep}", "")
            yield name, "", "", f"`{told}`", "refused", "refused"
            continue
        left = ", ".join(f"{kind} {count}" for kind, count in conversion.left_out.items())
        cells = []
        for weights in ("raw", "ema"):
            try:
                chosen = tf_checkpoint.convert(path, model=network, ema=weights)
            except UserError:
                cells.append("not there: refused")
                continue
            cells.append(f"{_largest(_logits(chosen, images), logits[weights]):.1e}")
        taken = conversion.info["source"]["weights"]
        yield name, str(conversion.num_read), taken, left or "nothing", *cells


def _logits(conversion: Conversion, images: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(conversion.model.apply)(conversion.variables, images), np.float64)


def _largest(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.max(np.abs(found - expected)) / np.std(expected))


def _run(arguments: Sequence[str]) -> None:
    parser = Parser(*__doc__.split("\n\n", 1))
    tables: dict[str, Callable[[Sequence[str]], Iterator[tuple[str, ...]]]] = {
        **{name: lambda names, peer=name: _peer_rows(peer, names) for name in _PEERS},
        "official": _official_rows,
        "checkpoints": lambda _: _checkpoint_rows(),
    }
    parser.add_argument("table", choices=tables)
    parser.add_argument("names", nargs="*", metavar="NAME", help="networks; default: all")
    flags = parser.parse_args(arguments)
    for number, row in enumerate(tables[flags.table](flags.names)):
        print(f"| {' | '.join(row)} |", flush=True)
        if not number:
            print("|---" * len(row) + "|")


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    return exit_code(_run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
