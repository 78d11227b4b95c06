"""One undisturbed run, made once, that several tests look at."""

import contextlib
import io
import pathlib
from typing import NamedTuple

import jax
import pytest

from effv2_jax.training import loop
from tests.training import tiny


class FinishedRun(NamedTuple):
    workdir: pathlib.Path
    results: dict[str, float]
    printed: str
    compiled: list[str]  # functions that XLA compiled, or read from its cache


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    compiled = []

    def note(event, seconds, **facts):
        del seconds
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(facts["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(note)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            results = loop.train(tiny.tiny_config(), workdir)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    return FinishedRun(workdir, results, printed.getvalue(), compiled)
