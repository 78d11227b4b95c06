"""The benchmark of augmentation stays in step with what it measures."""

import importlib.util
from pathlib import Path

import jax

from effv2_jax.data.policy import OPERATIONS

TOOL = Path(__file__).parents[2] / "tools" / "benchmarks" / "augment.py"


def _tool():
    spec = importlib.util.spec_from_file_location("benchmark_augment", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_row_can_be_traced_and_every_operation_has_one():
    names = []
    for name, function, arguments in _tool().rows(2, 16, "auto"):
        jax.eval_shape(function, *arguments)
        names.append(name)
    assert set(OPERATIONS) < set(names)
    assert len(names) == len(set(names))


def test_measure_gives_times_of_the_clock_and_of_the_processor():
    wall, processor = _tool().measure(lambda x: x + 1, (jax.numpy.zeros(8),), rounds=3)
    assert wall > 0
    assert processor > 0
