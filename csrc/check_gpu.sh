#!/usr/bin/env bash
# On a machine with a GPU: builds, compiles for every architecture, tests, runs compute-sanitizer, times, and prints the
# tables that README.md shows. PYTHON chooses the interpreter, of an environment with torch for CUDA and the test extra.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}

"$PYTHON" -c 'import sys, torch; torch.cuda.is_available() or sys.exit("error: torch finds no GPU here")'
MSTEP_CUDA=1 "$PYTHON" setup.py build_ext --inplace
"$PYTHON" csrc/compile_kernels.py
"$PYTHON" -m pytest tests/emulation tests/csrc tests/ops tests/benchmarks/test_kernels.py
for tool in memcheck racecheck synccheck; do
  compute-sanitizer --tool "$tool" --error-exitcode 1 \
    "$PYTHON" -m pytest tests/ops/test_adapter_kernels.py -k "cuda and error_is_at_most"
done
"$PYTHON" tools/benchmark.py kernels
"$PYTHON" tools/benchmark.py adapter
