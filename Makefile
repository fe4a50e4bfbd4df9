# `make demo` and `make test` are the two commands of the README; each makes .venv first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
EXTRAS ?= dev,diffusion,gpu,plots,interpret
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -q --durations=5
# A test of the plain lane is one process: as many side by side as there are cores.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))

# Bytecode stays on: importing torch without it takes several times as long, in every rank.
unexport PYTHONDONTWRITEBYTECODE
# Ranks share the cores; a thread pool per rank would fight over them.
export OMP_NUM_THREADS ?= 1
# Nothing here asks a model hub.
export HF_HUB_OFFLINE ?= 1

.PHONY: .venv demo test lint types bench docs build
.venv demo test lint types bench docs build: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

demo:
	$(BIN)/stretto generate --ranks 2 --compare --out out/demo

# pytest exits 5 when a lane holds no test: that fails here too.
test:
	$(PYTEST) -n $(WORKERS) --dist worksteal -m 'not ranks and not slow and not gpu'
	$(PYTEST) -m 'ranks and not slow and not gpu'

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types:
	$(BIN)/pyrefly check

bench:
	$(BIN)/stretto bench steps --out out/steps.json

docs:
	$(BIN)/python docs/render.py --check
	$(PYTEST) tests/test_docs.py

# The wheel alone in a fresh environment, its dependencies borrowed from .venv through a path
# file (which does not bring .venv's editable stretto along).
build:
	rm -rf dist build
	$(BIN)/pip wheel -q --no-deps -w dist .
	$(BIN)/python -m venv build/clean
	build/clean/bin/pip install -q --no-deps dist/*.whl
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > $$(echo build/clean/lib/python*/site-packages)/borrowed.pth
	cd build && clean/bin/stretto --version && clean/bin/python ../tests/wheel.py
