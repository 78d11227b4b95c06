"""Counting a program that is compiled for a device that is not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from benchmarks.compiled_program import count  # noqa: E402

# As XLA prints a program for a GPU: a fusion, a convolution with its workspace, a call, a loop,
# a copy, a transpose of an activation and a message between devices.
PROGRAM = """\
HloModule jit_f, is_scheduled=true, entry_computation_layout={(bf16[2,4]{1,0})->f32[2,4]{1,0}}

%fused_transpose (param_0.1: bf16[2,4]) -> bf16[4,2] {
  %param_0.1 = bf16[2,4]{1,0} parameter(0)
  ROOT %transpose.1 = bf16[4,2]{1,0} transpose(%param_0.1), dimensions={1,0}
}

%inner (p: f32[3]) -> f32[3] {
  %p = f32[3]{0} parameter(0)
  ROOT %copy.1 = f32[3]{0} copy(%p), metadata={op_name="jit(f)/jvp(Net)/stem/norm/copy"}
}

ENTRY %main.1 (a: bf16[2,4], b: f32[3]) -> (bf16[4,2], f32[3]) {
  %a = bf16[2,4]{1,0} parameter(0)
  %b = f32[3]{0} parameter(1)
  %constant.1 = f32[] constant(0)
  %fusion.1 = bf16[4,2]{1,0} fusion(%a), kind=kInput, calls=%fused_transpose, \
metadata={op_name="jit(f)/transpose(jvp(Net))/blocks_1/se/mul" stack_frame_id=3}
  %conv.1 = (bf16[4,2]{1,0}, u8[16]{0}) custom-call(%fusion.1, %b), window={size=1x1}, \
custom_call_target="__cudnn$convForward", metadata={op_name="jit(f)/jvp(Net)/stem/conv/conv"}
  %get-tuple-element.1 = bf16[4,2]{1,0} get-tuple-element(%conv.1), index=0
  %bitcast.1 = bf16[8]{0} bitcast(%get-tuple-element.1)
  %call.1 = f32[3]{0} call(%b), to_apply=%inner
  %all-reduce-start.1 = f32[3]{0} all-reduce-start(%call.1), to_apply=%inner
  %all-reduce-done.1 = f32[3]{0} all-reduce-done(%all-reduce-start.1)
  ROOT %tuple.1 = (bf16[4,2]{1,0}, f32[3]{0}) tuple(%get-tuple-element.1, %all-reduce-done.1)
}
"""


def test_every_kernel_counts_its_operands_and_its_results():
    counts = count(PROGRAM, large=4)
    assert counts.kernels == {"fusion": 1, "cuDNN": 1, "copy": 1, "collective": 1}
    fusion, convolution, copy, message = 16 + 16, 16 + 12 + 16 + 16, 12 + 12, 12 + 12
    assert counts.bytes == fusion + convolution + copy + message
    assert counts.parts == {
        "squeeze-excite, backward": fusion,
        "convolution, forward": convolution,
        "norm and activation, forward": copy,
        "collectives": message,
    }
    assert (counts.collectives, counts.collective_bytes) == (1, 12)
    assert [entry[0] for entry in counts.heaviest] == sorted(
        (fusion, convolution, copy, message), reverse=True
    )


def test_a_transpose_larger_than_any_parameter_is_one_of_activations():
    assert (count(PROGRAM, large=4).transposes, count(PROGRAM, large=4).small_transposes) == (1, 0)
    assert (count(PROGRAM, large=8).transposes, count(PROGRAM, large=8).small_transposes) == (0, 1)


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no entry"):
        count("HloModule nothing\n", large=1)


def _compile_only(*arguments):
    return subprocess.run(
        [sys.executable, "tools/benchmark.py", "compile-only", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("h300",), "'h300'"),
        (("h200", "--model", "efficientnetv2-x"), "efficientnetv2-x"),
        (("h200", "--image-size", "128,big"), "'big'"),
        (("h200", "--lowering", "fast"), "'fast'; expected auto, plain"),
        (("h200", "--xla", "xla_allow_excess_precision"), "expected NAME=VALUE"),
        (("h200", "--json", "no/such/folder/x.json"), "there is no folder"),
        (("h200", "--text", "no/such/folder"), "there is no such folder"),
        (("h200", "--config", "configs/nothing.py"), "configs/nothing.py"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(arguments, message):
    done = _compile_only(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_a_plugin_that_is_missing_is_named_with_what_installs_it():
    code = (
        "import importlib.util, sys; sys.path.insert(0, 'tools')\n"
        "from benchmarks import compile_only\n"
        "importlib.util.find_spec = lambda name: None\n"
        "from effv2_jax.command import exit_code\n"
        "sys.exit(exit_code(compile_only.run, ['h200']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert 'pip install "effv2_jax[cuda12]"' in done.stderr


@pytest.mark.slow
def test_a_training_step_is_compiled_for_gpus_that_are_not_there(tmp_path):
    pytest.importorskip("jax_cuda12_plugin", reason="compiles for NVIDIA GPUs (extra cuda12)")
    file = tmp_path / "counts.json"
    done = _compile_only(
        *("h200", "--model", "testing", "--image-size", "32", "--batch", "4,8", "--devices", "2"),
        *("--json", str(file), "--top", "1"),
    )
    assert done.returncode == 0, done.stderr
    content = json.loads(file.read_text())
    assert content["environment"]["command"].endswith("--batch 4,8 --devices 2 --top 1")
    result, larger = content["results"]
    assert 0 < result["device_bytes"] < larger["device_bytes"]
    *_, header, line = done.stdout.splitlines()
    assert header.split()[-2:] == ["141", "GB"]
    assert line.startswith("effv2_jax gpu: testing, 32 px, bfloat16, train")
    assert result["bytes_per_image"] > 0
    assert result["flop_per_image"] > 0
    assert result["temporaries_per_image"] > 0
    assert result["kernels"]["cuDNN"] > 10
    assert result["collectives"] > 0  # BatchNorm's statistics and the gradients
    assert result["transposes_of_activations"] == 0
    assert "memory allows" in done.stdout
