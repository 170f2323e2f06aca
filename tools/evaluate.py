"""The command `megatron-step evaluate`, in a clone that is not installed."""

import sys

from megatron_step.cli.evaluate import main
from megatron_step.cli.output import reader_may_go

if __name__ == "__main__":
    with reader_may_go():
        sys.exit(main())
