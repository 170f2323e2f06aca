# make demo | make test | make test-long | make lint | make kernels | make clean
# PYTHON=python3.12 chooses the interpreter of a new .venv, WORKERS=8 how many processes run tests at once.
PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-long lint kernels clean

demo: $(INSTALLED)
	PATH="$(BIN):$$PATH" examples/step/run.sh

# A test's worlds have up to eight processes: one thread each keeps them from crowding each other out.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test: lint
	$(PYTEST)

# All pairs of layouts and settings, and twenty times the random inputs: hours.
test-long: lint
	$(PYTEST) -m "long or not long" --hypothesis-profile long

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Needs nvcc, no GPU: compiles the CUDA kernels, shows what they take, fails if one spills registers.
kernels: $(INSTALLED)
	$(BIN)/python csrc/compile_kernels.py

# torch first: the C++ extension is compiled against the very torch that it will run with.
$(INSTALLED): pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch numpy setuptools wheel ninja pybind11
	$(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build runs *.egg-info megatron_step/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
