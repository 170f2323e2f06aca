"""The token ids of a sample in megatron-core's GPTDataset."""

import numpy as np
import numpy.typing as npt
from megatron.core.datasets.gpt_dataset import GPTDataset


def sample_ids(dataset: GPTDataset, index: int) -> npt.NDArray[np.int64]:
    """Return the token ids of one sample, [s + 1]."""
    # GPTDataset's `__getitem__` also makes masks [s, s] and position ids [s] for each sample (megatron-core 0.16.1).
    return dataset._query_document_sample_shuffle_indices(index)[0]
