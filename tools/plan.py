"""The command `megatron-step plan`, in a clone that is not installed."""

import sys

from megatron_step.cli.plan import main

if __name__ == "__main__":
    sys.exit(main())
