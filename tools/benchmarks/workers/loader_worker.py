"""This project's loader: `python loader_worker.py`, see serve.py and benchmarks/loader.py.

With the allocator of the commands, which peers get too.
"""

import os
import sys
from collections.abc import Mapping
from typing import Any

from pipeline import Run, timed, trial
from serve import Prepared, fastest, serve

from effv2_jax import startup
from effv2_jax.errors import UserError

_ENDLESS = 1_000_000  # steps


def _prepare(task: Mapping[str, Any]) -> Prepared:
    from effv2_jax.config import base_config
    from effv2_jax.data.loader import train_batches
    from effv2_jax.data.sources import open_source
    from effv2_jax.training.progressive import plan_stages

    batch, cores = task["batch"], task["cores"]
    data = base_config().data
    data.source, data.dir, data.decoder = "folder", task["folder"], task["decoder"]
    source = open_source(data, "train")
    stages = plan_stages(
        num_examples=_ENDLESS * batch, batch_size=batch, epochs=1.0, image_size=task["image_size"]
    )

    def make(workers: int, threads: int) -> Run:
        config = data.copy_and_resolve_references()
        config.workers, config.threads = workers, threads

        def start() -> Any:
            return train_batches(source, stages, config, seed=0, start_step=0, stop_step=_ENDLESS)

        # Of each thread two chunks of 32 may lie ready, of each process two more.
        return timed(start, warm=2 + 4 * cores * 32 // batch)

    ways = {
        f"{cores} threads": lambda: make(0, cores),
        f"{cores} processes": lambda: make(cores, 1),
    }
    run, facts = fastest(ways, task.get("candidate"), trial=trial(batch))
    facts["settings"] = facts["candidate"]
    chosen = [name for name in startup.ALLOCATOR_VARIABLES if name in os.environ]
    facts["variables"] = {name: os.environ[name] for name in chosen}
    return Prepared(run=run, facts=facts)


if __name__ == "__main__":
    startup.tune(sys.argv)
    serve(_prepare, refusals=(UserError,))
