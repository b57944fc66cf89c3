# make pretrain   an LLLN hybrid on real text, its sequences shared among the GPUs found, or among 4 CPU ranks
# make test       lint, types, tests on one process and on four ranks; with ALL=1 also those that are left out for their time
#
# Both make the environment first, in .venv. Options:
#   ARGS    more options of pretrain.py:  make pretrain ARGS="--mixer gla --steps 500"
#   RANKS   how many ranks train
#   PYTHON  the Python to make the environment with, 3.10 or newer

PYTHON ?= python3
BIN := .venv/bin
RANKS ?= $(shell gpus=$$(nvidia-smi -L 2>/dev/null | grep -c '^GPU'); [ "$$gpus" -gt 0 ] && echo $$gpus || echo 4)

.PHONY: pretrain test lint test-one test-ranks clean
.DELETE_ON_ERROR:

pretrain: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node $(RANKS) \
		pretrain.py --sp lasp2 --pattern LLLN --layout zigzag --out runs/pretrain $(ARGS)

test: lint test-one test-ranks

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-one: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not mpi and not gpu$(if $(ALL),, and not slow)" -n auto --maxprocesses 8

# Every rank runs every test; what ranks other than 0 print shows when they fail. After a failure ranks are out of step: -x.
test-ranks: export OMP_NUM_THREADS = 1
test-ranks: export OMPI_ALLOW_RUN_AS_ROOT = 1
test-ranks: export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM = 1
test-ranks: .venv/ready
	$(BIN)/mpirun --oversubscribe -n 4 $(BIN)/python -m pytest --with-mpi -m "mpi$(if $(ALL),, and not slow)" -x

.venv/ready: pyproject.toml requirements/pinned.txt requirements/engines.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "lasp needs Python 3.10 or newer: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/pinned.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/engines.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

clean:
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
