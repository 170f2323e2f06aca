"""The command `megatron-step export-hf`, in a clone that is not installed."""

import sys

from megatron_step.cli.export_hf import main

if __name__ == "__main__":
    sys.exit(main())
