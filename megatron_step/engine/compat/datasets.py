"""A sample of megatron-core's GPTDataset before it is made into tensors."""

import numpy as np
import numpy.typing as npt
from megatron.core.datasets.gpt_dataset import GPTDataset


def sample_ids(dataset: GPTDataset, index: int) -> npt.NDArray[np.int64]:
    """The token ids of one sample, [s + 1]."""
    # Its `__getitem__` adds masks and position ids, [s, s] and [s] for each sample (megatron-core 0.16.1).
    return dataset._query_document_sample_shuffle_indices(index)[0]
