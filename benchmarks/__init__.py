"""The benchmarks that `tools/benchmark.py` runs."""

import megatron_step  # noqa: F401  # its import hook comes before any import of megatron-core, also in spawned processes
