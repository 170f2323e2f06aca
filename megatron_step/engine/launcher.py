"""What started this process: a shell in a pod of a job may have a rank in its environment that no launcher gave it."""

import os


def started_by_torchrun() -> bool:
    """Whether torchrun started this process, with others that wait for it."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def speaks() -> bool:
    """Whether this process prints for all that torchrun started with it."""
    return not started_by_torchrun() or os.environ.get("RANK", "0") == "0"
