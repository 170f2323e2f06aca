"""The command `megatron-step evaluate`, in a clone that is not installed."""

import sys

from megatron_step.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
