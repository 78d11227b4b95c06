"""Process settings of the test suite; they must be made before JAX is imported.

Four simulated CPU devices let one process prove that results do not depend on the number of
devices. Compiled programs are kept between test runs: most of the time of a cold run is XLA.
Property tests draw the same cases in every run, so that a change is to blame for what fails;
HYPOTHESIS_PROFILE=explore draws new ones.
"""

import os
import tempfile
from pathlib import Path

import hypothesis


def _set_environment() -> None:
    """Sets what the user has not set; child processes of the tests inherit it."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=4".strip()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    user = os.getuid() if hasattr(os, "getuid") else "user"
    cache = Path(tempfile.gettempdir()) / f"effv2_jax_test_cache_{user}"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    os.environ.setdefault("MPLBACKEND", "Agg")


_set_environment()

hypothesis.settings.register_profile("repeat", derandomize=True, deadline=None)
hypothesis.settings.register_profile("explore", deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))
