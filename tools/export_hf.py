"""The command `megatron-step export-hf`, in a clone that is not installed."""

import sys

from megatron_step.cli.export_hf import main
from megatron_step.cli.output import reader_may_go

if __name__ == "__main__":
    with reader_may_go():
        sys.exit(main())
