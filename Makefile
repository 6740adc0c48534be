PYTHON ?= python3
BIN := .venv/bin

.PHONY: convert test check zoo format setup clean

convert: setup
	$(BIN)/lathe convert recipes/digits.toml

test: check
	$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

zoo: setup
	$(BIN)/python -m tests.zoo

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[cpu,train,dev,zoo,serve,ray,security,attribute]"
	touch $@

clean:
	rm -rf .venv out
