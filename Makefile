# The project's commands. `make setup` makes an environment in .venv; where a virtual environment is
# active, or with VENV=PATH, that one is used instead.

PYTHON ?= python3
VENV ?= $(or $(VIRTUAL_ENV),.venv)
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.effv2_jax-installed

# Two processes: most of a test's time is XLA compiling, which one process leaves a core idle for.
WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: help setup quickstart test test-all lint format clean

help:
	@echo "make quickstart   train a small network on handwritten digits, start to end, no download"
	@echo "make test         the tests, at most 15 minutes on 2 cores"
	@echo "make test-all     all tests, the long ones too"
	@echo "make lint         ruff: rules and formatting"
	@echo "make format       let ruff mend what it can"
	@echo "make setup        the environment alone (the others make it when it is missing)"

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[dev]'
	@touch $@

quickstart: setup
	$(BIN)/python -m effv2_jax.main --config configs/digits.py --workdir runs/quickstart
	@echo
	@echo "The network in runs/quickstart has learned to read digits in three progressive stages."
	@echo "  learning curves   runs/quickstart/curves.png"
	@echo "  weights           runs/quickstart/final.safetensors"
	@echo "  all numbers       runs/quickstart/metrics.jsonl, or: tensorboard --logdir runs"
	@echo "What to try next:"
	@echo "  without stages    $(BIN)/python -m effv2_jax.main --config configs/digits.py \\"
	@echo "                      --workdir runs/one-stage --config.progressive.image_sizes=32 \\"
	@echo "                      --config.progressive.dropout_rates=0.1"
	@echo "  your own photos   configs/folder.py"
	@echo "  what is in a net  $(BIN)/python -m effv2_jax.models.summary efficientnetv2-s"

test: setup
	$(PYTEST) -m "not slow"

test-all: setup
	$(PYTEST)

lint: setup
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

format: setup
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
