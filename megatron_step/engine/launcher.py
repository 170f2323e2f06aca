"""How this process was started. A shell in a job's pod may have RANK in its environment without a launcher."""

import os


def started_by_torchrun() -> bool:
    """Return whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def speaks() -> bool:
    """Return whether this process prints for all processes that torchrun started with it."""
    return not started_by_torchrun() or os.environ.get("RANK", "0") == "0"
