"""The command `megatron-step preprocess`, in a clone that is not installed."""

import sys

from megatron_step.cli.output import reader_may_go
from megatron_step.cli.preprocess import main

if __name__ == "__main__":
    with reader_may_go():
        sys.exit(main())
