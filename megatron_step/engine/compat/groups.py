"""The store of torch's default process group, through which ranks exchange values that are not tensors."""

import torch
from torch.distributed import Store


def default_store() -> Store:
    """Return the store of torch's default process group."""
    store: Store = torch.distributed.distributed_c10d._get_default_store()
    return store
