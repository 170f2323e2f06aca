"""Pre-training of large language models in growing stages, on Megatron-Core."""

from megatron_step.engine import cpu

# The one thing done at import: megatron-core must meet the hook before any of its modules is loaded.
cpu.install_import_hook()
