"""Process settings: applied once, by commands only, never over the user's own."""

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from effv2_jax import processor, startup

ROOT = Path(__file__).parent.parent

# A command as those under tools/: it tunes first and then says what it found.
COMMAND = """
import json, os, sys
first = os.environ.get("FIRST_PID")
os.environ.setdefault("FIRST_PID", str(os.getpid()))
from effv2_jax import startup
line = startup.tune(sys.argv, enabled="--no-tune" not in sys.argv)
names = ("XLA_FLAGS", "LD_PRELOAD", "MALLOC_CONF", "GLIBC_TUNABLES", "TF_CPP_MIN_LOG_LEVEL")
print(json.dumps({
    "line": line,
    "argv": sys.argv[1:],
    "restarted": first is not None,
    "same_process": os.environ["FIRST_PID"] == str(os.getpid()),
    "input": sys.stdin.read(),
    "optimize": sys.flags.optimize,
    "environment": {name: os.environ[name] for name in names if name in os.environ},
}))
if "--wait" in sys.argv:
    import time
    sys.stdout.flush()
    time.sleep(60)
"""

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")


@pytest.fixture
def project(tmp_path):
    """A copy of the project's shape: tools/ beside a package that holds the real start-up code."""
    (tmp_path / "effv2_jax").mkdir()
    (tmp_path / "effv2_jax" / "__init__.py").write_text("")
    for module in (processor, startup):
        file = Path(module.__file__)
        (tmp_path / "effv2_jax" / file.name).write_text(file.read_text())
    (tmp_path / "effv2_jax" / "command.py").write_text(COMMAND)
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "command.py").write_text(COMMAND)
    (tmp_path / "elsewhere.py").write_text(COMMAND)
    return tmp_path


def _environment(project, **changes):
    ours = ("XLA_", "LD_PRELOAD", "MALLOC_CONF", "GLIBC_TUNABLES", "TF_CPP_", "EFFV2_", "FIRST_PID")
    env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**env, "PYTHONPATH": str(project), "JAX_PLATFORMS": "cpu", **changes}


def _run(project, *arguments, text="", **changes):
    result = subprocess.run(
        [sys.executable, *arguments],
        env=_environment(project, **changes),
        cwd=project,
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@linux
@pytest.mark.parametrize("how", [("tools/command.py",), ("-O", "-m", "effv2_jax.command")])
def test_a_command_starts_itself_again_once_with_another_allocator(project, how):
    seen = _run(project, *how, "a b", "--x=1", text="typed")
    assert seen["restarted"]
    assert seen["same_process"]
    assert seen["argv"] == ["a b", "--x=1"]
    assert seen["input"] == "typed"
    assert seen["optimize"] == ("-O" in how)
    assert seen["environment"].keys() & {"LD_PRELOAD", "GLIBC_TUNABLES"}
    assert seen["environment"]["TF_CPP_MIN_LOG_LEVEL"] == "2"
    assert seen["line"].startswith("tuning: ")
    assert "\n" not in seen["line"]
    assert ("jemalloc" in seen["line"]) or ("glibc" in seen["line"])


@linux
@pytest.mark.parametrize(
    ("arguments", "changes"), [(["--no-tune"], {}), ([], {"EFFV2_NO_TUNE": "1"})]
)
def test_tuning_can_be_refused(project, arguments, changes):
    seen = _run(project, "tools/command.py", *arguments, **changes)
    assert not seen["restarted"]
    assert seen["environment"] == {}
    assert seen["line"] == "tuning: none (refused)"


def _with_the_allocator(code):
    """Returns what a program prints that runs with the allocator of commands."""
    settings, _ = startup._allocator({})
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **settings}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    return done.stdout


@linux
def test_memory_that_the_allocator_keeps_is_given_back_when_told():
    code = (
        "from pathlib import Path\n"
        "from effv2_jax import startup\n"
        "resident = lambda: int(Path('/proc/self/statm').read_text().split()[1]) * 4096 / 2**20\n"
        "blocks = [bytearray(1 << 16) for _ in range(4000)]\n"
        "del blocks\n"
        "kept = resident()\n"
        "startup.release_freed_memory()\n"
        "print(kept, resident())\n"
    )
    kept, left = map(float, _with_the_allocator(code).split())
    assert kept > 250  # MiB: both allocators keep what is freed
    assert left < kept - 150


@linux
def test_a_block_that_threads_take_in_turn_is_one_block():
    """XLA takes the memory of a step now in one of its threads, now in another."""
    if "LD_PRELOAD" not in startup._allocator({})[0]:
        pytest.skip("libjemalloc2 is not installed; glibc gives such blocks back")
    code = (
        "import concurrent.futures, threading\n"
        "from pathlib import Path\n"
        "resident = lambda: int(Path('/proc/self/statm').read_text().split()[1]) * 4096 / 2**20\n"
        "turn, threads = threading.Lock(), threading.Barrier(9)\n"
        "def take():\n"
        "    threads.wait()\n"
        "    with turn:\n"
        "        block = bytearray(b'x') * (100 << 20)\n"
        "        del block\n"
        "    threads.wait()\n"  # a thread that ends gives its memory back
        "    threads.wait()\n"
        "before = resident()\n"
        "with concurrent.futures.ThreadPoolExecutor(8) as pool:\n"
        "    for _ in range(8):\n"
        "        pool.submit(take)\n"
        "    threads.wait(), threads.wait()\n"
        "    print(resident() - before)\n"
        "    threads.wait()\n"
    )
    assert 90 < float(_with_the_allocator(code)) < 150  # MiB


@linux
def test_the_users_own_settings_stay(project):
    own = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=3 --xla_cpu_prefer_vector_width=128",
        "GLIBC_TUNABLES": "glibc.malloc.arena_max=1",
        "TF_CPP_MIN_LOG_LEVEL": "0",
    }
    seen = _run(project, "tools/command.py", **own)
    assert not seen["restarted"]
    assert seen["environment"] == own


@linux
def test_a_program_that_is_not_a_command_is_neither_changed_nor_started_again(project):
    seen = _run(project, "elsewhere.py")
    assert not seen["restarted"]
    assert not seen["environment"].keys() - {"TF_CPP_MIN_LOG_LEVEL"}
    assert seen["line"] == "tuning: none (not started as a command)"


@linux
def test_nothing_is_set_where_jax_is_loaded_or_an_accelerator_computes(project, monkeypatch):
    seen = _run(project, "tools/command.py", JAX_PLATFORMS="cuda,cpu")
    assert not seen["restarted"]
    assert "XLA_FLAGS" not in seen["environment"]
    monkeypatch.setitem(sys.modules, "jax", object())
    monkeypatch.delenv("EFFV2_TUNED", raising=False)
    monkeypatch.delenv("EFFV2_NO_TUNE", raising=False)
    before = dict(os.environ)
    assert "JAX was imported" in startup.tune(sys.argv)
    assert os.environ.get("XLA_FLAGS") == before.get("XLA_FLAGS")


@linux
def test_signals_reach_the_process_that_was_started_again(project):
    process = subprocess.Popen(
        [sys.executable, "tools/command.py", "--wait"],
        env=_environment(project),
        cwd=project,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert '"restarted": true' in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == -signal.SIGTERM


@linux
def test_flags_that_jaxlib_does_not_know_are_not_set(monkeypatch):
    """XLA ends the process at an unknown flag."""
    known = startup._known_flags(["xla_force_host_platform_device_count", "xla_no_such_flag_ever"])
    assert known == {"xla_force_host_platform_device_count"}
    monkeypatch.setattr(startup, "_known_flags", lambda names: set())
    assert startup._xla_flags({"XLA_FLAGS": "--mine=1"}) == ("--mine=1", [])


@linux
def test_the_flags_that_are_set_are_accepted(tmp_path):
    flags, _ = startup._xla_flags({})
    code = "import jax; print(jax.jit(lambda x: x + 1)(1), jax.device_count())"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    out = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
    )
    assert out.returncode == 0, out.stderr
    devices = int(flags.rpartition("device_count=")[2]) if "device_count" in flags else 1
    assert out.stdout.split() == ["2", str(devices)]


@pytest.mark.parametrize(("cores", "devices"), [(1, 0), (2, 2), (3, 2), (6, 4), (64, 8)])
def test_devices_are_a_power_of_two_of_the_cores(monkeypatch, cores, devices):
    monkeypatch.setattr(startup, "usable_cores", lambda: cores)
    monkeypatch.setattr(startup, "_known_flags", set)
    monkeypatch.setattr(startup, "_has_fast_avx512", lambda core: False)
    flags, notes = startup._xla_flags({})
    if devices:
        assert flags == f"--xla_force_host_platform_device_count={devices}"
        assert notes == [f"{devices} cores as devices"]
    else:
        assert (flags, notes) == ("", [])


@pytest.mark.parametrize(
    ("vendor", "family", "model", "flags", "fast"),
    [
        ("AuthenticAMD", 26, 2, "avx2 avx512f avx512_bf16", True),
        ("AuthenticAMD", 25, 1, "avx2", False),
        ("GenuineIntel", 6, 207, "avx512f avx512_bf16 amx_tile", True),
        ("GenuineIntel", 6, 207, "avx512f avx512_vnni", True),  # hidden by a virtual machine
        ("GenuineIntel", 6, 207, "avx2", False),
        ("GenuineIntel", 6, 106, "avx512f avx512_vnni", False),  # Ice Lake
        ("GenuineIntel", 6, 151, "avx2 avx_vnni", False),  # Alder Lake
    ],
)
def test_512_bit_vectors_are_for_processors_that_keep_their_clock(
    tmp_path, vendor, family, model, flags, fast
):
    file = tmp_path / "cpuinfo"
    core = f"vendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: {model}\n"
    core += f"flags\t\t: {flags}\n"
    file.write_text(f"processor\t: 0\n{core}\nprocessor\t: 1\n{core}")
    assert startup._has_fast_avx512(processor.describe(file)) is fast


def test_a_system_that_does_not_describe_its_processor_keeps_its_vectors(tmp_path):
    file = tmp_path / "cpuinfo"
    assert startup._has_fast_avx512(processor.describe(file)) is False
    file.write_text("processor\t: 0\nFeatures\t: fp asimd\n\n")
    assert startup._has_fast_avx512(processor.describe(file)) is False


def test_the_users_choice_of_compiler_passes_stays(monkeypatch):
    monkeypatch.setattr(startup, "usable_cores", lambda: 2)
    assert startup.compiler_options(2)
    monkeypatch.setenv("XLA_FLAGS", "--xla_disable_hlo_passes=dce")
    assert startup.compiler_options(2) == {}


@pytest.fixture
def jax_config():
    """JAX's configuration, put back afterwards."""
    import jax

    names = (
        "jax_enable_compilation_cache",
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    yield jax.config
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_compilation_cache_is_in_the_users_cache_folder(tmp_path, monkeypatch, jax_config):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("DIR", "MIN_COMPILE_TIME_SECS", "MIN_ENTRY_SIZE_BYTES"):
        for prefix in ("JAX_COMPILATION_CACHE_", "JAX_PERSISTENT_CACHE_"):
            monkeypatch.delenv(prefix + name, raising=False)
    folder = startup.enable_compilation_cache("auto")
    assert folder == tmp_path / "cache" / "effv2_jax" / "xla"
    assert folder.is_dir()
    assert jax_config.jax_compilation_cache_dir == str(folder)
    assert jax_config.jax_persistent_cache_min_compile_time_secs == 0
    assert startup.enable_compilation_cache(str(tmp_path / "own")) == tmp_path / "own"


def test_the_users_own_cache_settings_stay(tmp_path, monkeypatch, jax_config):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "7")
    before = jax_config.jax_persistent_cache_min_compile_time_secs
    assert startup.enable_compilation_cache("auto") == tmp_path
    assert jax_config.jax_persistent_cache_min_compile_time_secs == before


def test_programs_that_cannot_be_kept_are_not_warned_of(tmp_path, jax_config):
    template = "Error writing persistent compilation cache entry for 'jit_f': {}"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        startup.enable_compilation_cache(str(tmp_path))
        for error in ("MemoryError: std::bad_alloc", "OSError: no space left on device"):
            warnings.warn(template.format(error), stacklevel=1)
    assert [str(warning.message) for warning in told] == [
        template.format("OSError: no space left on device")
    ]


def test_no_cache_and_a_folder_that_cannot_be_written(tmp_path, capsys, jax_config):
    (tmp_path / "file").write_text("")
    assert startup.enable_compilation_cache(str(tmp_path / "file" / "cache")) is None
    warning = capsys.readouterr().err
    assert str(tmp_path / "file" / "cache") in warning
    assert warning.count("\n") == 1
    assert startup.enable_compilation_cache("none") is None
    assert not jax_config.jax_enable_compilation_cache
