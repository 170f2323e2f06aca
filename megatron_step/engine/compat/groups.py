"""torch's default process group: its store, where ranks can leave what is no tensor."""

import torch
from torch.distributed import Store


def default_store() -> Store:
    """The store that the ranks of the default process group have met in."""
    store: Store = torch.distributed.distributed_c10d._get_default_store()
    return store
