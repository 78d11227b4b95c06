"""What a worker process of the loader does first."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def start_worker(index: int, count: int) -> None:
    """Prepares a worker process; called by Grain in the process.

    * Signals are the trainer's business: a worker that dies at Ctrl-C or at a preemption notice
      would take the trainer's last steps before its checkpoint with it.
    * A worker whose trainer was killed ends itself; nobody else would end it.
    * Grain imports JAX: it must not take a part of the accelerator's memory.

    Args:
      index: of this worker.
      count: of the workers.
    """
    del index, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_platforms", "cpu")
