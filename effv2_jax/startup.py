"""Process settings that commands apply before JAX is imported; importing the library never does.

On a CPU the largest gains lie outside the program: XLA allocates all its buffers anew for every
step, and glibc's allocator gives them back to the kernel each time, so that half of the time goes
into page faults; and XLA uses vectors of 256 bits where the processor has 512
(`docs/cpu_forms.md` has measurements). An allocator must be chosen before the process
starts, so a command starts itself again once, in the same process id, with `LD_PRELOAD` set.

Nothing that the user has set is changed. `--no-tune` or EFFV2_NO_TUNE=1 leaves everything alone.
"""

import contextlib
import ctypes
import importlib.util
import mmap
import os
import platform
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

from effv2_jax import processor

# Set in the process that was started again: what is in force. Children inherit it with the
# settings, so that they do not start themselves again either.
_MARKER = "EFFV2_TUNED"
_REFUSE = "EFFV2_NO_TUNE"

# Freed memory is kept, in huge pages, instead of being given back after every step, and in one
# arena: XLA's threads take the memory of a step in turn, and each would keep a block of its own.
ONE_ARENA = ",narenas:1"
_MALLOC_CONF = f"dirty_decay_ms:-1,muzzy_decay_ms:-1,thp:always,oversize_threshold:0{ONE_ARENA}"
_PURGE_ALL_ARENAS = b"arena.4096.purge"  # jemalloc's MALLCTL_ARENAS_ALL
_GLIBC_TUNABLES = (
    "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=274877906944:glibc.malloc.hugetlb=1"
)
_SAPPHIRE_RAPIDS = 143  # its model within Intel's family 6; later ones have higher numbers
ALLOCATOR_VARIABLES = ("LD_PRELOAD", "MALLOC_CONF", "GLIBC_TUNABLES")
_JEMALLOC_FOLDERS = (
    f"/usr/lib/{platform.machine()}-linux-gnu",
    "/usr/lib64",
    "/usr/lib",
    "/usr/local/lib",
    f"{sys.prefix}/lib",
)

# JAX's warning of a program that XLA cannot write down.
_NOT_WRITTEN = "Error writing persistent compilation cache entry .*MemoryError: std::bad_alloc"

# More CPU devices split a batch ever finer; eight is where this was last seen to be harmless.
_MAX_CPU_DEVICES = 8


def tune(argv: list[str], *, enabled: bool = True) -> str:
    """Applies the process settings; may start the process again, once.

    To be called by a command before anything imports JAX and before it reads standard input or
    writes anything. The process id, its environment and its open standard streams stay.

    Args:
        argv: the command's `sys.argv`.
        enabled: False (the flag --no-tune) leaves everything as it is.

    Returns:
        One line that says what is in force.
    """
    if not enabled or os.environ.get(_REFUSE, "0") not in ("", "0"):
        return "tuning: none (refused)"
    _quieten(os.environ)
    if _MARKER in os.environ:
        return f"tuning: {os.environ[_MARKER]}"
    if not sys.platform.startswith("linux"):
        return "tuning: none (Linux only)"
    if "jax" in sys.modules:
        return "tuning: none (JAX was imported before)"
    if _accelerator_present(os.environ):
        return "tuning: none needed (an accelerator computes)"

    if not _is_own_command(argv):
        return "tuning: none (not started as a command)"

    flags, notes = _xla_flags(os.environ)
    if flags:
        os.environ["XLA_FLAGS"] = flags
    allocator, note = _allocator(os.environ)
    if allocator:
        told = ", ".join([note, *notes])
        environment = {**os.environ, **allocator, _MARKER: f"{told} (--no-tune: as it was)"}
        sys.stdout.flush()
        sys.stderr.flush()
        # Where the system forbids this the run goes on, slower.
        with contextlib.suppress(OSError):
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    return f"tuning: {', '.join(['allocator as it was', *notes])}"


def enable_compilation_cache(setting: str) -> Path | None:
    """Keeps compiled programs between runs; imports JAX.

    Args:
        setting: "auto" (the user's cache folder, or JAX_COMPILATION_CACHE_DIR where it is set),
            "none", or a folder.

    Returns:
        The folder in use, or None. A folder that cannot be written to is told on standard error
        and not used: a cache is no reason to stop a run.
    """
    import jax

    if setting == "none":
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    own = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if setting != "auto":
        folder = Path(setting).expanduser()
    elif own:
        folder = Path(own)
    else:
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        folder = Path(home).expanduser() / "effv2_jax" / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except (OSError, RuntimeError):  # RuntimeError: "~" without a home
        writable = False
    if not writable:
        print(
            f"warning: compiled programs are not kept: cannot write to {folder}; "
            "set runtime.compilation_cache to a folder, or to none",
            file=sys.stderr,
        )
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # A program with oneDNN's operations (bfloat16 on CPUs, `models/lowering/cpu_onednn.py`) cannot
    # be written: the next process compiles it again, and its user can do nothing about it.
    warnings.filterwarnings("ignore", message=_NOT_WRITTEN, category=UserWarning)
    # JAX keeps only programs that took a second; the many small ones of a start add up.
    for option, value in (
        ("jax_persistent_cache_min_compile_time_secs", 0.0),
        ("jax_persistent_cache_min_entry_size_bytes", -1),
    ):
        if option.upper() not in os.environ:
            jax.config.update(option, value)
    return folder


def compiler_options(devices: int) -> dict[str, str]:
    """Returns what the compiler is told of a program over several devices; imports JAX.

    Where every core of a CPU is a device, kernels are not divided among threads: the threads of the
    other cores have the other devices' kernels to compute, and a part given to them waits. This
    belongs to the program, not to the process: `--no-tune` does not refuse it, XLA_FLAGS with
    xla_disable_hlo_passes does.

    Args:
        devices: of this process, that compute the program.

    Returns:
        Options by XLA's names; {} where nothing is to be told.
    """
    import jax

    option = "xla_disable_hlo_passes"
    if jax.default_backend() != "cpu" or devices < max(2, usable_cores()):
        return {}
    if option in os.environ.get("XLA_FLAGS", ""):
        return {}
    return {option: "cpu-parallel-task-assigner"}


def release_freed_memory() -> None:
    """Gives freed memory back to the system once, where `tune` made the allocator keep it.

    For after a compilation, which needs more memory than most steps do and never the same again,
    and between two stages, whose steps need blocks of different sizes.
    """
    environment = os.environ
    if environment.get("MALLOC_CONF") == _MALLOC_CONF:
        control = getattr(ctypes.CDLL(None), "mallctl", None)
        if control is not None:
            control(_PURGE_ALL_ARENAS, None, None, None, 0)
    elif environment.get("GLIBC_TUNABLES") == _GLIBC_TUNABLES:
        ctypes.CDLL(None).malloc_trim(0)


def usable_cores() -> int:
    """Returns how many cores this process may keep busy: affinity and container quota counted."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores or 1


def _quieten(environment: dict[str, str]) -> None:
    """XLA's notes about what it found on the machine are for its developers."""
    environment.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def _accelerator_present(environment: Mapping[str, str]) -> bool:
    """Whether JAX will compute on a GPU or TPU: asked for, or a plugin and its device are there."""
    asked = environment.get("JAX_PLATFORMS", "")
    if asked:
        return asked.split(",")[0] != "cpu"
    plugin = any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))
    devices = ("nvidiactl", "nvidia0", "kfd", "accel0", "vfio/0")
    return plugin and any(Path("/dev", name).exists() for name in devices)


def _xla_flags(environment: Mapping[str, str]) -> tuple[str, list[str]]:
    """Returns XLA_FLAGS with our additions, and what to say about them."""
    flags = environment.get("XLA_FLAGS", "")
    wanted = []
    if _has_fast_avx512(processor.describe()):
        wanted.append(("xla_cpu_prefer_vector_width", 512, "512-bit vectors"))
    # A power of two, so that the usual batch sizes can be split.
    devices = 2 ** (min(usable_cores(), _MAX_CPU_DEVICES).bit_length() - 1)
    if devices > 1:
        wanted.append(
            ("xla_force_host_platform_device_count", devices, f"{devices} cores as devices")
        )
    missing = [entry for entry in wanted if entry[0] not in flags]
    known = _known_flags([name for name, _, _ in missing])
    added = [entry for entry in missing if entry[0] in known]
    text = " ".join([flags, *(f"--{name}={value}" for name, value, _ in added)]).strip()
    return text, [note for _, _, note in added]


def _has_fast_avx512(core: Mapping[str, str]) -> bool:
    """Whether a processor has AVX-512 and belongs to a generation that runs it at full clock.

    bfloat16 instructions tell: AMD from Zen 4 and Intel from Sapphire Rapids have them, the Intel
    generations that lower their clock for 512-bit vectors do not. A virtual machine may hide them,
    so of Intel's the model counts too.
    """
    flags, family, model = (core.get(key, "") for key in ("flags", "cpu family", "model"))
    intel = core.get("vendor_id") == "GenuineIntel" and family == "6" and model.isdigit()
    recent = intel and int(model) >= _SAPPHIRE_RAPIDS
    return "avx512f" in flags.split() and ("avx512_bf16" in flags.split() or recent)


def _known_flags(names: list[str]) -> set[str]:
    """Returns those XLA flags that the installed jaxlib knows.

    XLA ends the process at an unknown flag, and flags come and go with its versions. Their names
    stand as text in the library, so they are looked for there.
    """
    spec = importlib.util.find_spec("jaxlib")
    folders = list(spec.submodule_search_locations or []) if spec else []
    libraries = [path for folder in folders for path in Path(folder).glob("*.so")]
    if not libraries or not names:
        return set()
    largest = max(libraries, key=lambda path: path.stat().st_size)
    with (
        largest.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        return {name for name in names if content.find(name.encode()) >= 0}


def _allocator(environment: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """Returns the environment of a better allocator and what to say; {} to leave it alone."""
    if any(name in environment for name in ALLOCATOR_VARIABLES):
        return {}, ""
    for folder in _JEMALLOC_FOLDERS:
        library = Path(folder, "libjemalloc.so.2")
        if library.is_file():
            settings = {"LD_PRELOAD": str(library), "MALLOC_CONF": _MALLOC_CONF}
            return settings, "jemalloc"
    if platform.libc_ver()[0] == "glibc":
        note = "glibc keeps freed memory (faster with jemalloc: package libjemalloc2)"
        return {"GLIBC_TUNABLES": _GLIBC_TUNABLES}, note
    return {}, ""


def _is_own_command(argv: list[str]) -> bool:
    """Whether this process runs one of the project's commands and can be started again.

    Not so in a test, a notebook or another program that calls a command's `main`: starting that
    again would repeat whatever it has done.
    """
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    count = len(argv) - 1
    if file is None or (count and sys.orig_argv[-count:] != argv[1:]):
        return False
    package = Path(__file__).resolve().parent
    own = (package, package.parent / "tools")
    return any(Path(file).resolve().is_relative_to(folder) for folder in own)
