"""Imports point one way, and what must be light is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "effv2_jax"

# Layer -> the layers it may import besides itself. Single modules of the package are layers too.
MAY_IMPORT = {
    "errors": set(),
    "atomic": {"errors"},
    "command": {"atomic", "errors"},
    "config_schema": set(),
    "config": {"config_schema", "data", "errors", "models", "pretrained"},
    "config_files": {"config", "errors"},
    "models": {"command", "errors", "processor"},
    "data": {"errors"},
    "convert": {"atomic", "command", "data", "errors", "models"},
    "pretrained": {"atomic", "command", "convert", "data", "errors", "models"},
    "report": {"atomic", "command", "errors"},
    "inference": {
        "atomic", "command", "config", "data", "errors", "models", "pretrained", "report",
        "startup",
    },
    "training": {
        "atomic", "config", "convert", "data", "errors", "models", "pretrained", "report",
        "startup",
    },
    "processor": set(),
    "startup": {"errors", "processor"},
    "tuned": {"command", "errors", "startup"},
    "main": {"command", "config", "config_files", "errors", "startup", "training"},
    "__init__": {"errors"},
}  # fmt: skip

# Names, not modules: `from effv2_jax import __version__`.
PACKAGE_NAMES = {"UserError", "__version__"}

# What a data worker process loads: no JAX, whose start and memory each worker would pay.
WORKER_MODULES = ("sources", "decode", "preprocess", "loader")

HEAVY = ("jax", "jaxlib", "flax", "optax", "orbax", "tensorflow", "tensorflow_datasets", "grain")


def _layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imported_layers(path: Path) -> set[str]:
    """The layers that a file imports, wherever in the file."""
    layers = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "effv2_jax" and len(parts) > 1:
                layers.add(parts[1])
    return layers - PACKAGE_NAMES


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    layer = _layer(path)
    assert layer in MAY_IMPORT, f"{layer} is new: say in MAY_IMPORT what it may import"
    wrong = _imported_layers(path) - MAY_IMPORT[layer] - {layer}
    assert not wrong, f"{path.relative_to(ROOT)} ({layer}) imports {sorted(wrong)}"


def test_the_layers_have_no_cycle():
    order, left = [], dict(MAY_IMPORT)
    while left:
        free = [layer for layer, below in left.items() if below <= set(order)]
        assert free, f"a cycle among {sorted(left)}"
        order += free
        left = {layer: below for layer, below in left.items() if layer not in free}


def test_no_file_is_a_drawer_for_everything():
    for path in FILES:
        assert path.stem not in ("utils", "helpers", "common", "misc"), path


def _loaded_by(statement: str) -> set[str]:
    """Top-level packages among HEAVY that a fresh interpreter has after a statement."""
    code = f"{statement}\nimport sys\nprint(*(n for n in {HEAVY} if n in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("module", WORKER_MODULES)
def test_data_workers_load_no_jax(module):
    loaded = _loaded_by(f"import effv2_jax.data.{module}")
    assert not loaded & {"jax", "jaxlib", "flax"}


def test_importing_the_package_loads_nothing_heavy():
    assert not _loaded_by("import effv2_jax; effv2_jax.UserError; dir(effv2_jax)")


def test_tables_and_plans_load_nothing_heavy():
    statement = (
        "import effv2_jax.main, effv2_jax.models.variants, effv2_jax.training.progressive;"
        "effv2_jax.list_models()"
    )
    assert not _loaded_by(statement)


def test_public_names_can_be_imported():
    import effv2_jax

    for name in effv2_jax.__all__:
        assert getattr(effv2_jax, name) is not None
    with pytest.raises(AttributeError, match="public names"):
        effv2_jax.nothing
