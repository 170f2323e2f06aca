"""All ranks of the default process group read and write one store."""

import torch
from worlds import Worlds

from megatron_step.engine.compat.groups import default_store


def test_ranks_share_the_store(worlds: Worlds) -> None:
    assert worlds(2).run(leave_and_read) == [b"1", b"0"]


def leave_and_read() -> bytes:
    rank = torch.distributed.get_rank()
    default_store().set(f"left/{rank}", str(rank))
    return default_store().get(f"left/{1 - rank}")
