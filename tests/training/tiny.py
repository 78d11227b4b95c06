"""A run of seconds with all on: augmentation, mixing, dropout, drop path, average, stages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import safetensors.numpy

from effv2_jax.config import base_config, from_json, to_json

STEPS = 24  # of the whole run, 8 a stage


def tiny_config(**overrides):
    """The config; overrides by flattened keys ("train.seed": 1).

    Stage 2 differs from stage 1 in knobs only, stage 3 in its image size too.
    """
    config = base_config()
    config.model.name = "testing"
    config.model.dtype = "float32"
    config.model.lowering = "plain"  # compiles fastest
    config.model.blocks = ("r1_k3_s2_e1_i8_o8_c1", "r2_k3_s2_e2_i8_o16_se0.25")
    config.data.source = "digits"
    config.data.augment_layers = 1
    config.train.batch_size = 16
    config.train.epochs = 24.5 * 16 / 1438
    config.train.warmup_epochs = 0.0
    config.train.optimizer = "momentum"
    config.train.schedule = "cosine"
    config.train.learning_rate = 0.5
    config.train.ema_decay = 0.9
    config.progressive.image_sizes = (16, 16, 24)
    config.progressive.magnitudes = (5.0, 7.0, 10.0)
    config.progressive.dropout_rates = (0.1, 0.2, 0.3)
    config.progressive.mixup_alphas = (0.0, 0.2, 0.4)
    config.progressive.cutmix_alphas = (0.0, 0.2, 0.4)
    config.eval.image_size = 24  # up to 16 it would be a factor
    config.eval.batch_size = 64
    config.eval.every_epochs = 0.06
    config.runtime.devices = 1
    config.runtime.log_every_steps = 4  # checkpoints fall between two records
    config.runtime.checkpoint_every_steps = 3
    config.update_from_flattened_dict(overrides)
    return config


def start_process(config, workdir, *, die_at=0, signal_number=0, cluster=()):
    """Starts training in a process of its own, which sends itself a signal after a step.

    Args:
      config: the config.
      workdir: of the run.
      die_at: step after which the signal comes; 0: never.
      signal_number: which.
      cluster: (coordinator's address, number of processes, number of this one); (): alone.

    Returns:
      The `subprocess.Popen`; its standard output has all that is printed.
    """
    arguments = [str(value) for value in (workdir, die_at, signal_number, *cluster)]
    environment = dict(os.environ)
    if cluster:
        environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.training.tiny", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parents[2],
        env=environment,
    )
    process.stdin.write(to_json(config))
    process.stdin.close()
    process.stdin = None
    return process


def run_in_process(config, workdir, *, die_at=0, signal_number=0, timeout=300):
    """Runs `start_process` to its end.

    Returns:
      Exit code (negative: killed by that signal) and all that was printed.
    """
    process = start_process(config, workdir, die_at=die_at, signal_number=signal_number)
    try:
        printed, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, printed


def saved_state(config, workdir):
    """The newest checkpoint of a run: path -> array, all of the state."""
    import jax

    from effv2_jax.training import setup
    from effv2_jax.training.checkpoint import Checkpoints

    with Checkpoints(Path(workdir) / "checkpoints", read_only=True) as checkpoints:
        state = checkpoints.restore(setup.state_shapes(setup.prepare(config)))
    leaves = jax.tree.leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def final_weights(workdir):
    """The tensors of final.safetensors: name -> array."""
    return safetensors.numpy.load_file(Path(workdir) / "final.safetensors")


def records(workdir):
    """metrics.jsonl without what depends on the clock."""
    lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    clock = ("images_per_second", "data_wait")
    return [
        {key: value for key, value in json.loads(line).items() if key not in clock}
        for line in lines
    ]


def assert_equal_bits(found, expected):
    """Two dicts of arrays are the same in every bit."""
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype, name
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def _child(workdir, die_at, signal_number, *cluster):
    if cluster:
        names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        os.environ.update(zip(names, cluster, strict=True))
    from effv2_jax.training import loop, run

    counted = run.MetricsLogger.step

    def step(self, step, **waits):
        counted(self, step, **waits)
        if step == int(die_at):
            os.kill(os.getpid(), int(signal_number))

    run.MetricsLogger.step = step
    loop.train(from_json(sys.stdin.read()), workdir)


if __name__ == "__main__":
    _child(*sys.argv[1:])
