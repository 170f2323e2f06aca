"""Run the command `megatron-step` by `python -m megatron_step COMMAND`."""

import sys

from megatron_step.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
