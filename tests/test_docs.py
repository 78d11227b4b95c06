"""What the documents say exists: files, commands, extras, targets, keys, numbers."""

import re
import tomllib
from pathlib import Path

import pytest

from effv2_jax.config import base_config, keys
from effv2_jax.config_files import load_config, split_argument
from tests import reference

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

pytestmark = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_recipes_and_keys_of_the_commands_exist(page):
    text = page.read_text()
    for config in re.findall(r"--config (configs/[\w.:]+)", text):
        if config != "configs/NAME.py":
            path, argument = split_argument(config)
            load_config(ROOT / path, argument)
    for key in re.findall(r"--config\.([\w.]+)=", text):
        assert key in keys(base_config()) or key == "data.KEY", key
    for section, key in re.findall(r"`(model|data|train|progressive|eval)\.(?!json)(\w+)", text):
        assert f"{section}.{key}" in keys(base_config()), f"{section}.{key}"


def test_make_targets_and_extras_exist(page):
    text = page.read_text()
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([\w-]+)", text, re.MULTILINE)) <= targets
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in re.findall(r"pip install -e '\.\[([\w-]+)\]'", text):
        assert extra in extras["optional-dependencies"], extra


def test_modules_that_are_commands_exist(page):
    for module in re.findall(r"python -m (effv2_jax[\w.]*)", page.read_text()):
        path = ROOT / (module.replace(".", "/") + ".py")
        if path.with_suffix("").is_dir():
            path = path.with_suffix("") / "__main__.py"
        assert '__name__ == "__main__"' in path.read_text()


def test_table_of_models_has_the_official_numbers(page):
    rows = re.findall(r"^\| (efficientnet\S+) \|([^\n]*)\|$", page.read_text(), re.MULTILINE)
    if page.name != "README.md":
        assert not rows
        return
    facts = reference.load_json("models.json")
    assert [name for name, _ in rows] == list(facts)
    for name, row in rows:
        parameters, multiply_adds, train, evaluation, _ = (cell.strip() for cell in row.split("|"))
        expected = facts[name]
        assert int(parameters.replace(",", "")) == expected["params_trainable"]
        assert multiply_adds == f"{expected['multiply_adds_at_eval_size'] / 1e9:.2f}"
        assert (int(train), int(evaluation)) == (expected["train_size"], expected["eval_size"])
