"""What Linux says of this machine's processor."""

from pathlib import Path


def describe(description: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """Returns the fields of the (first) core by Linux's names, as "model" and "flags".

    Args:
        description: Linux's file.

    Returns:
        {} where there is none.
    """
    try:
        first = description.read_text().partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
