"""Programs are compiled once, ahead, and their memory is known."""

import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effv2_jax import startup
from effv2_jax.training import mesh as meshes
from effv2_jax.training.compile import Programs, StepPrograms, device_bytes, scaled_memory


class FakeLowered:
    """Stands for `jax.stages.Lowered`: says when it is compiled and waits until it may."""

    def __init__(self, *, gate=None, error=None):
        self.gate, self.error = gate, error
        self.started = threading.Event()
        self.threads = []

    def __call__(self):
        return self

    def compile(self, options):
        assert not options
        self.threads.append(threading.current_thread())
        self.started.set()
        if self.gate is not None:
            assert self.gate.wait(30)
        if self.error:
            raise self.error
        return types.SimpleNamespace(memory_analysis=lambda: None)


def double_step(state, batch, knobs):
    """A train step in small: the state's buffer can be used again for the new one."""
    return state + batch["x"].sum() * knobs["scale"], {"loss": batch["x"].mean()}


def step_programs(programs, mesh, *, state_size=1000):
    everywhere, rows = meshes.replicated(mesh), meshes.batch_sharding(mesh)
    return StepPrograms(
        programs,
        double_step,
        state=lambda *_: jax.ShapeDtypeStruct((state_size,), jnp.float32, sharding=everywhere),
        batch=lambda size, n: {"x": jax.ShapeDtypeStruct((n, size), jnp.float32, sharding=rows)},
        knobs={"scale": jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)},
    )


def test_stage_that_changes_knobs_only_does_not_compile(finished_run):
    # Stage 2 has another magnitude, dropout rate, mixup and CutMix; only stage 3 another size.
    assert finished_run.compiled.count("jit(train_step)") == 2
    assert finished_run.compiled.count("jit(local_eval)") == 1


def test_each_size_compiles_once_and_knobs_never():
    mesh = meshes.make_mesh(1)
    with Programs(background=False) as programs:
        steps = step_programs(programs, mesh)
        for size, batch, expected in ((8, 4, 1), (8, 4, 1), (16, 4, 2), (8, 8, 3), (16, 4, 3)):
            for scale in (1.0, 2.0):
                state = meshes.put_replicated(np.zeros(1000, np.float32), mesh)
                knobs = meshes.put_replicated({"scale": np.float32(scale)}, mesh)
                x = jax.device_put(np.ones((batch, size), np.float32), meshes.batch_sharding(mesh))
                new, metrics = steps.get(size, batch).run(state, {"x": x}, knobs)
                assert float(new[0]) == batch * size * scale
                assert float(metrics["loss"]) == 1
                assert state.is_deleted()  # donated
            assert programs.compilations == expected


def test_prepared_program_compiles_beside_the_main_thread_and_is_not_made_again():
    gate = threading.Event()
    lowered = FakeLowered(gate=gate)
    with Programs() as programs:
        programs.prepare("next stage", lowered)
        assert lowered.started.wait(30)  # under way, while this thread goes on
        assert programs.finished("next stage") is None
        programs.prepare("next stage", lowered)
        gate.set()
        program = programs.get("next stage", lowered)
        assert programs.finished("next stage") is program
        assert programs.compilations == 1
    assert lowered.threads[0] is not threading.main_thread()
    assert len(lowered.threads) == 1


def test_program_that_only_waits_in_the_queue_is_made_at_once_when_needed():
    gate = threading.Event()
    slow, needed = FakeLowered(gate=gate), FakeLowered()
    with Programs() as programs:
        programs.prepare("slow", slow)
        assert slow.started.wait(30)
        programs.prepare("needed", needed)
        programs.get("needed", needed)  # would never return if it stood behind the slow one
        assert needed.threads == [threading.main_thread()]
        gate.set()


def test_failure_in_the_background_is_raised_where_the_program_is_needed():
    lowered = FakeLowered(error=RuntimeError("out of memory"))
    with Programs() as programs:
        programs.prepare("stage 2", lowered)
        with pytest.raises(RuntimeError, match="out of memory"):
            programs.get("stage 2", lowered)
        assert programs.finished("stage 2") is None
        assert programs.compilations == 0


def test_without_background_nothing_is_compiled_before_it_is_needed():
    lowered = FakeLowered()
    with Programs(background=False) as programs:
        programs.prepare("stage 2", lowered)
        assert not lowered.threads
        programs.get("stage 2", lowered)
    assert lowered.threads == [threading.main_thread()]


def test_close_drops_what_waits():
    gate = threading.Event()
    running, waiting = FakeLowered(gate=gate), FakeLowered()
    programs = Programs()
    programs.prepare("running", running)
    assert running.started.wait(30)
    programs.prepare("waiting", waiting)
    threading.Timer(0.1, gate.set).start()
    programs.close()
    assert not waiting.threads


def test_every_new_program_is_reported_with_its_time():
    reported = []
    with Programs(on_compiled=reported.append) as programs:
        steps = step_programs(programs, meshes.make_mesh(1))
        steps.prepare(8, 4)
        program = steps.get(8, 4)
        steps.get(8, 4)
    assert reported == [program]
    assert program.seconds > 0
    assert "8 px, batch 4" in program.name


def test_memory_counts_donated_buffers_once():
    with Programs(background=False) as programs:
        program = step_programs(programs, meshes.make_mesh(1), state_size=10**6).get(8, 4)
    # The state's 4 MB serve as argument and as result.
    assert 4e6 <= program.memory < 5e6


def test_memory_is_that_of_one_device():
    def memory(devices):
        with Programs(background=False) as programs:
            steps = step_programs(programs, meshes.make_mesh(devices), state_size=1)
            return steps.get(10**5, 4).memory

    # 4 rows of 400 kB on one device, or one row on each of four
    assert memory(1) == pytest.approx(1.6e6, rel=0.01)
    assert memory(4) == pytest.approx(0.4e6, rel=0.01)


def test_scaled_memory_scales_all_but_the_state():
    assert scaled_memory(1000, fixed=400, pixels=4.0) == 400 + 4 * 600
    assert scaled_memory(1000, fixed=400, pixels=0.5) == 400 + 300
    # A backend that counts less than the state must not give less than it measured.
    assert scaled_memory(1000, fixed=1200, pixels=4.0) == 1000


def test_device_bytes_counts_one_device():
    mesh = meshes.make_mesh(4)
    whole = jax.ShapeDtypeStruct((8, 3), jnp.float32, sharding=meshes.replicated(mesh))
    split = jax.ShapeDtypeStruct((8, 3), jnp.uint8, sharding=meshes.batch_sharding(mesh))
    assert device_bytes({"a": whole, "b": [split]}) == 8 * 3 * 4 + 2 * 3


@pytest.mark.parametrize(
    ("cores", "devices", "divided"), [(4, 4, False), (2, 4, False), (8, 4, True), (1, 1, True)]
)
def test_kernels_are_divided_among_threads_unless_all_cores_are_devices(
    monkeypatch, cores, devices, divided
):
    monkeypatch.setattr(startup, "usable_cores", lambda: cores)
    rows = meshes.batch_sharding(meshes.make_mesh(devices))
    x = jax.ShapeDtypeStruct((64, 10**5), jnp.float32, sharding=rows)
    with Programs(devices=devices, background=False) as programs:
        program = programs.get("tanh", lambda: jax.jit(jnp.tanh).lower(x))
    assert ('"outer_dimension_partitions":["' in program.run.as_text()) == divided
