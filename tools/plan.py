"""The command `megatron-step plan`, in a clone that is not installed."""

import sys

from megatron_step.cli.output import reader_may_go
from megatron_step.cli.plan import main

if __name__ == "__main__":
    with reader_may_go():
        sys.exit(main())
