# Each target sets up what it needs in .venv, with nothing but Python, git and make at the start.
# A stamp is written only after a full success, so an interrupted or failed set-up is simply run
# again. pip follows its own environment variables and configuration (PIP_INDEX_URL, ...).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
REQUIREMENTS := pyproject.toml setup.py constraints.txt
CHECKED := fastomni kernels/fastomni_kernels $(wildcard bench)

CONFIG ?= configs/rlvr.yaml
ARGS ?=
# Two processes with a thread each: what the slowest supported machine has.
TEST_ENV := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}

RETRY = { echo 'Set-up failed: see above. Run the same command again; what is done is kept.' >&2; \
          exit 1; }

.PHONY: help train test test-slow test-gpu sanitize lint clean
.DELETE_ON_ERROR:

help:
	@echo 'make train      train the embedded demo end to end (ARGS="key=value ..." changes settings)'
	@echo 'make test       linters, types and all tests that are not slow'
	@echo 'make test-slow  the slow tests'
	@echo 'make test-gpu   the tests of the kernels, compiled, on the GPU of this machine'
	@echo 'make sanitize   the same under compute-sanitizer (comes with CUDA)'
	@echo 'make lint       linters and types'
	@echo 'make clean      remove .venv and caches; runs/ is kept'

train: $(VENV)/.ready
	@$(BIN)/torchrun --standalone --nproc-per-node=1 -m fastomni.train $(CONFIG) $(ARGS)

test: lint
	@$(TEST_ENV) $(BIN)/python -m pytest -q -m 'not slow' -n 2 --dist loadfile $(ARGS)

test-slow: $(VENV)/.ready-dev
	@$(TEST_ENV) $(BIN)/python -m pytest -q -m slow $(ARGS)

test-gpu: $(VENV)/.ready-dev
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { \
	    echo 'torch sees no GPU here: run $(BIN)/python -m fastomni.doctor' >&2; exit 1; }
	@$(BIN)/python -m pytest -q tests/ops tests/model/test_elementwise.py $(ARGS)

sanitize: $(VENV)/.ready-dev
	@command -v compute-sanitizer >/dev/null || { \
	    echo 'compute-sanitizer is not on the path; it comes with the CUDA toolkit' >&2; exit 1; }
	@PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
	    $(BIN)/python -m pytest -q tests/ops -k kernel $(ARGS)

lint: $(VENV)/.ready-dev
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check . || { echo 'Run: $(BIN)/ruff format .' >&2; exit 1; }
	@$(BIN)/python -m mypy --no-error-summary $(CHECKED)

clean:
	@rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo 'fastomni needs Python 3.10 or newer; name one: make PYTHON=python3.12' >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) || { \
	    echo 'Python cannot make a virtual environment here; on Debian and Ubuntu run:' \
	         'sudo apt install python3-venv' >&2; exit 1; }
	@touch $@

# torch comes first and alone: asked for by name, pip takes a CPU build where its index or its
# find-links offer one, and the packages after it then find torch in place.
$(VENV)/.ready: $(VENV)/.created $(REQUIREMENTS)
	@echo 'Setting up $(VENV) (a few minutes, once)'
	@$(PIP) install 'setuptools>=77' wheel || $(RETRY)
	@$(PIP) install -c constraints.txt torch || $(RETRY)
	@$(PIP) install -c constraints.txt --no-build-isolation -e . || $(RETRY)
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	@echo 'Setting up the tools for tests'
	@$(PIP) install -c constraints.txt --no-build-isolation -e '.[dev,liger,trl]' || $(RETRY)
	@touch $@
