# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.luthier-setup

.PHONY: setup demo test test-all check docs support wheel clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt scripts/setup.py
	@$(PYTHON) scripts/setup.py $(VENV)
	@touch $(STAMP)

demo: setup
	@$(BIN)/python scripts/demo.py

test: check
	$(BIN)/python -m pytest -m "not long"

test-all: check
	$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff format --check luthier tests scripts benchmarks
	$(BIN)/ruff check luthier tests scripts benchmarks
	$(BIN)/pyright
	$(BIN)/python scripts/reference.py --check

docs: setup
	$(BIN)/python scripts/reference.py

support: setup
	$(BIN)/python scripts/support.py
	$(BIN)/python scripts/support.py layouts
	$(BIN)/python scripts/reference.py

wheel: setup
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) build dist *.egg-info demo
