"""This project's loader: `python loader_worker.py`, see serve.py and benchmarks/loader.py.

With the allocator of the commands, which peers get too.
"""

import dataclasses
import os
import sys
from collections.abc import Mapping
from typing import Any

from pipeline import Run, fastest, timed
from serve import Prepared, serve

from effv2_jax import startup
from effv2_jax.errors import UserError

_ALLOCATOR = ("LD_PRELOAD", "MALLOC_CONF", "GLIBC_TUNABLES")
_ENDLESS = 1_000_000_000


@dataclasses.dataclass(frozen=True)
class _Stage:
    """The fields of `training.progressive.Stage` that the loader reads."""

    index: int
    image_size: int
    batch_size: int
    start_step: int
    end_step: int
    first_example: int


def _prepare(task: Mapping[str, Any]) -> Prepared:
    from effv2_jax.config import base_config
    from effv2_jax.data.loader import train_batches
    from effv2_jax.data.sources import open_source

    batch, cores = task["batch"], task["cores"]
    data = base_config().data
    data.source, data.dir, data.decoder = "folder", task["folder"], task["decoder"]
    source = open_source(data, "train")
    stage = _Stage(0, task["image_size"], batch, 0, _ENDLESS, 0)

    def make(workers: int, threads: int) -> Run:
        config = data.copy_and_resolve_references()
        config.workers, config.threads = workers, threads

        def start() -> Any:
            return train_batches(source, (stage,), config, seed=0, start_step=0, stop_step=_ENDLESS)

        # Of each thread two chunks of 32 may lie ready, of each process two more.
        return timed(start, warm=2 + 4 * cores * 32 // batch)

    ways = {f"{cores} threads": make(0, cores), f"{cores} processes": make(cores, 1)}
    run, facts = fastest(ways, batch)
    facts["settings"] = facts["candidate"]
    facts["variables"] = {name: os.environ[name] for name in _ALLOCATOR if name in os.environ}
    return Prepared(run=run, facts=facts)


if __name__ == "__main__":
    startup.tune(sys.argv)
    serve(_prepare, refusals=(UserError,))
