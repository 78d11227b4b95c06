"""What a run does and leaves behind."""

import json
import os
import re
import signal

import jax
import numpy as np
import pytest

from effv2_jax.convert.weights_file import load_weights
from effv2_jax.errors import UserError
from effv2_jax.training import loop, run
from tests.training import tiny


class Ended(Exception):
    """Ends a run in the test's own way."""


def test_first_lines_are_the_plan(finished_run):
    lines = finished_run.printed.splitlines()
    assert lines[0] == "model: testing, 4,200 parameters, 10 classes, float32"
    assert lines[1].startswith("data: digits, 1,438 training and 359 evaluation examples")
    assert lines[2] == "devices: 1 x cpu"
    assert lines[3].startswith("compiling the first step")
    rows = [line.split() for line in lines[5:8]]
    assert [row[1:3] for row in rows] == [["16", "px"], ["16", "px"], ["24", "px"]]
    assert [row[4:8] for row in rows] == [
        ["5", "0.1", "0", "0"],
        ["7", "0.2", "0.2", "0.2"],
        ["10", "0.3", "0.4", "0.4"],
    ]
    assert all(row[8] == "8" and row[10] == "128" for row in rows)
    assert all(re.fullmatch(r"~?\d+(\.\d)? MB", " ".join(row[11:])) for row in rows)


def test_plan_json_has_the_measured_memory_of_every_stage_in_the_end(finished_run):
    plan = json.loads((finished_run.workdir / "plan.json").read_text())
    assert [stage["memory_estimated"] for stage in plan["stages"]] == [False] * 3
    first, second, third = (stage["memory_bytes"] for stage in plan["stages"])
    assert 0 < first == second < third
    assert plan["train_examples"] == 1438
    assert plan["steps"] == tiny.STEPS


def test_training_is_recorded_every_four_steps_and_at_evaluations_with_its_stage(finished_run):
    train = [r for r in tiny.records(finished_run.workdir) if r["split"] == "train"]
    assert [r["step"] for r in train] == [4, 6, 8, 11, 12, 16, 20, 22, 24]
    assert [r["image_size"] for r in train] == [16] * 6 + [24] * 3
    assert all(np.isfinite(r["loss"]) and r["learning_rate"] >= 0 for r in train)


def test_evaluations_are_recorded_and_the_last_is_the_result(finished_run):
    evals = [r for r in tiny.records(finished_run.workdir) if r["split"] == "eval"]
    # every 0.06 epochs (5.4 steps), and at each stage's end
    assert [r["step"] for r in evals] == [6, 8, 11, 16, 22, 24]
    for name, value in finished_run.results.items():
        assert evals[-1][name] == pytest.approx(value)
    assert set(finished_run.results) == {
        "loss", "top1", "top5", "ema_loss", "ema_top1", "ema_top5",
    }  # fmt: skip


def test_final_weights_are_the_average_with_all_that_is_needed_to_use_them(finished_run):
    config = tiny.tiny_config()
    model, variables, info = load_weights(finished_run.workdir / "final.safetensors")
    state = tiny.saved_state(config, finished_run.workdir)
    kernel = np.asarray(variables["params"]["head"]["conv"]["kernel"])
    np.testing.assert_array_equal(kernel, state[".ema['params']['head']['conv']['kernel']"])
    assert not np.array_equal(kernel, state[".params['head']['conv']['kernel']"])
    assert info["image_size"] == 24
    assert info["labels"] == [str(digit) for digit in range(10)]
    assert info["preprocessing"]["kind"] == "v2"
    assert info["preprocessing"]["mean"] == [128.0] * 3
    assert info["metrics"]["ema_top1"] == pytest.approx(finished_run.results["ema_top1"])
    assert model.axis_name is None
    logits = jax.jit(model.apply)(variables, np.zeros((1, 24, 24, 3), np.float32))
    assert logits.shape == (1, 10)


def test_curves_and_the_summary_line(finished_run):
    assert (finished_run.workdir / "curves.png").read_bytes().startswith(b"\x89PNG")
    last = finished_run.printed.splitlines()[-1]
    assert last.startswith("done in ")
    assert f"top-1 {100 * finished_run.results['top1']:.2f}%" in last
    assert "final.safetensors" in last
    assert "curves.png" in last


def test_whole_run_is_equal_on_one_and_on_four_devices(tmp_path, finished_run):
    config = tiny.tiny_config(**{"runtime.devices": 4})
    loop.train(config, tmp_path)
    one, four = tiny.final_weights(finished_run.workdir), tiny.final_weights(tmp_path)
    for name in one:
        # Sums over the batch are taken in another order: float32 rounding, 24 steps of it. Means
        # of what was normalised before are zero but for rounding, hence the least scale.
        scale = max(np.abs(one[name]).max(), 1e-2)
        np.testing.assert_allclose(four[name], one[name], atol=1e-4 * scale, err_msg=name)
    of_one, of_four = tiny.records(finished_run.workdir), tiny.records(tmp_path)
    assert [r["step"] for r in of_four] == [r["step"] for r in of_one]
    for first, second in zip(of_one, of_four, strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-4)


def test_batch_that_the_devices_cannot_share_is_refused_before_any_work(tmp_path):
    config = tiny.tiny_config(**{"runtime.devices": 0, "train.batch_size": 18})
    with pytest.raises(UserError, match=r"train\.batch_size = 18: .* the 4 devices .* 16 or 20"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_more_devices_than_there_are_is_refused(tmp_path):
    config = tiny.tiny_config(**{"runtime.devices": 8, "train.batch_size": 16})
    with pytest.raises(UserError, match=r"runtime\.devices = 8: .* shows 4 cpu device"):
        loop.train(config, tmp_path / "run")


def test_model_with_fewer_classes_than_the_data_is_refused(tmp_path):
    config = tiny.tiny_config(**{"model.num_classes": 9})
    with pytest.raises(UserError, match=r"model\.num_classes = 9: the data set has 10"):
        loop.train(config, tmp_path / "run")


def with_learning_rate(monkeypatch, factors):
    """Multiplies the learning rate of stages by traced factors: no new program."""
    knobs = run.stage_knobs

    def changed(stage, recipe, *, seed):
        values = knobs(stage, recipe, seed=seed)
        return {**values, "lr_scale": np.float32(values["lr_scale"] * factors[stage.index])}

    monkeypatch.setattr(run, "stage_knobs", changed)


def test_diverged_run_stops_and_names_step_stage_and_checkpoint(tmp_path, monkeypatch):
    with_learning_rate(monkeypatch, [1, 1e30, 1])
    config = tiny.tiny_config()
    with pytest.raises(run.NonFiniteError) as caught:
        loop.train(config, tmp_path)
    found = re.match(
        r"step (\d+) \(stage 2 of 3, 16 px\): .*checkpoints/(\d+)\.", str(caught.value)
    )
    assert found, caught.value
    step, good = map(int, found.groups())
    assert 8 < step <= 16
    # The one named is there, is the newest, and is finite in every value.
    assert good == max(int(p.name) for p in (tmp_path / "checkpoints").glob("[0-9]*"))
    state = tiny.saved_state(config, tmp_path)
    assert all(np.isfinite(values).all() for values in state.values())
    assert not (tmp_path / "final.safetensors").exists()


def test_diverged_steps_can_be_skipped_and_counted(tmp_path, monkeypatch, capsys):
    knobs = run.stage_knobs

    def changed(stage, recipe, *, seed):
        values = knobs(stage, recipe, seed=seed)
        # Not a number in stage 2: no gradient of it may reach the weights.
        rate = np.float32("nan") if stage.index == 1 else values["dropout_rate"]
        return {**values, "dropout_rate": rate}

    monkeypatch.setattr(run, "stage_knobs", changed)
    config = tiny.tiny_config(**{"train.on_nonfinite": "skip"})
    results = loop.train(config, tmp_path)
    assert all(np.isfinite(list(results.values())))
    assert tiny.saved_state(config, tmp_path)[".skipped"] == 8
    assert "8 steps were skipped" in capsys.readouterr().out


def test_state_that_is_not_finite_is_never_saved(tmp_path, monkeypatch):
    # A finite step may still overflow a parameter: only the next loss would show it.
    look = run.Run._save

    def broken(self, state, results=None):
        if self.step >= 9:
            values = np.array(state.params["classifier"]["bias"])
            values[3] = np.inf
            state.params["classifier"]["bias"] = jax.device_put(values)
        look(self, state, results)

    monkeypatch.setattr(run.Run, "_save", broken)
    with pytest.raises(run.NonFiniteError, match=r"params/classifier/bias is not finite.*/8\."):
        loop.train(tiny.tiny_config(), tmp_path)
    assert max(int(p.name) for p in (tmp_path / "checkpoints").glob("[0-9]*")) == 8


def test_signal_that_prevents_an_evaluation_only_postpones_it(tmp_path, monkeypatch, finished_run):
    evaluated = run.Evaluator.__call__

    def interrupted(self, weights, *, stop):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluated(self, weights, stop=stop)

    config = tiny.tiny_config()
    with monkeypatch.context() as patch:
        patch.setattr(run.Evaluator, "__call__", interrupted)
        with pytest.raises(SystemExit) as caught:
            loop.train(config, tmp_path)
    assert caught.value.code == 128 + signal.SIGTERM
    assert [r["step"] for r in tiny.records(tmp_path) if r["split"] == "eval"] == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as it was before the run
    loop.train(config, tmp_path)
    assert tiny.records(tmp_path) == tiny.records(finished_run.workdir)


def test_estimates_are_printed_when_compiling_is_dear(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "_CHEAP_SECONDS", 0.0)

    def ended(self, stage, state):
        raise Ended

    monkeypatch.setattr(run.Run, "train_stage", ended)
    with pytest.raises(Ended):
        loop.train(tiny.tiny_config(), tmp_path)
    table = capsys.readouterr().out.splitlines()[5:8]
    assert "~" not in table[0]
    assert "~" not in table[1]  # the program of the first stage
    assert "~" in table[2]


def test_all_stages_are_compiled_first_when_that_is_cheap(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "_CHEAP_SECONDS", 1e9)

    def ended(self, stage, state):
        raise Ended

    monkeypatch.setattr(run.Run, "train_stage", ended)
    with pytest.raises(Ended):
        loop.train(tiny.tiny_config(), tmp_path)
    assert "~" not in capsys.readouterr().out


def test_memory_is_given_back_before_a_stage_with_another_program(tmp_path, monkeypatch):
    # Compiling gives back too: the steps are compiled first, the evaluation until it is needed.
    monkeypatch.setattr(run, "_CHEAP_SECONDS", 1e9)
    done, released = [0], []
    count = run.MetricsLogger.step

    def counted(self, step, **rest):
        done.append(step)
        count(self, step, **rest)

    monkeypatch.setattr(run.MetricsLogger, "step", counted)
    monkeypatch.setattr(run.startup, "release_freed_memory", lambda: released.append(done[-1]))
    loop.train(tiny.tiny_config(), tmp_path)
    first_evaluation = min(r["step"] for r in tiny.records(tmp_path) if r["split"] == "eval")
    assert [step for step in released if step > first_evaluation] == [16]  # of 8 and 16


def test_profile_traces_steps_of_a_stage(tmp_path, monkeypatch):
    train_stage = run.Run.train_stage

    def first_only(self, stage, state):
        train_stage(self, stage, state)
        raise Ended

    monkeypatch.setattr(run.Run, "train_stage", first_only)
    config = tiny.tiny_config(**{"runtime.profile": str(tmp_path / "profile")})
    with pytest.raises(Ended):
        loop.train(config, tmp_path / "run")
    assert list((tmp_path / "profile" / "stage_1").rglob("*.xplane.pb"))
