# Two commands on a fresh machine (Python 3.11, a C/C++ compiler, cmake): `make lab` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LAB_ARGS ?=
PYTEST_ARGS ?=
# Test files that run at once. Most tests keep one core busy, and many wait for other programs.
LANES ?= 2
BENCH_ARGS ?=
DEVICE_ARGS ?=
ROOT_FLAG := $(shell [ "$$(id -u)" = 0 ] && echo --allow-root)

# Kept bytecode: else every process that a test or a notebook starts compiles all of llmkit again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup cpu cuda metal vulkan lab test soak demo check bench measure device-check notebooks docs clean

setup:
	@PYTHON="$(PYTHON)" VENV="$(VENV)" bash .ci/setup

# llama.cpp for one kind of device, from now on; `LLMKIT_BACKEND=auto make setup` goes back to what suits the machine.
cpu cuda metal vulkan:
	@LLMKIT_BACKEND=$@ PYTHON="$(PYTHON)" VENV="$(VENV)" bash .ci/setup

lab: setup
	$(BIN)/jupyter lab $(ROOT_FLAG) notebooks/01_quickstart.ipynb $(LAB_ARGS)

test: setup
	@VENV="$(VENV)" bash .ci/clients
	$(BIN)/python -m pytest -n $(LANES) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

soak: setup
	SOAK=2000 $(BIN)/python -m pytest --timeout=0 tests/test_soak.py tests/test_replicas_fleet.py tests/test_browser.py $(PYTEST_ARGS)
	$(BIN)/python benchmarks/overload.py

demo: setup
	$(BIN)/python notebooks/demo.py

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --config .ci/importlinter.ini
	$(BIN)/python .ci/layout.py

notebooks: setup
	$(BIN)/python .ci/notebooks

docs: setup
	@VENV="$(VENV)" bash .ci/docs

bench: setup
	$(BIN)/python benchmarks/compare.py $(BENCH_ARGS)

measure: setup
	$(BIN)/python benchmarks/alone.py $(BENCH_ARGS)

device-check:
	@PYTHON="$(PYTHON)" VENV="$(VENV)" bash .ci/device-check $(DEVICE_ARGS)

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
