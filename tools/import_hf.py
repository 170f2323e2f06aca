"""The command `megatron-step import-hf`, in a clone that is not installed."""

import sys

from megatron_step.cli.import_hf import main

if __name__ == "__main__":
    sys.exit(main())
