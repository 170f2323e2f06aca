"""A sample's ids are a piece of the shuffled documents, one longer than the sample."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_step.config.data import DataConfig
from megatron_step.data.datasets import build_datasets
from megatron_step.data.tokenizer import load_tokenizer
from megatron_step.engine.compat.datasets import sample_ids


def test_a_sample_is_its_piece_of_the_documents(small_data: DataConfig, tmp_path: Path) -> None:
    config = replace(small_data, cache_dir=str(tmp_path))
    dataset = build_datasets(config, 32, load_tokenizer(config.tokenizer), 20, 0).train
    tokens = np.concatenate([dataset.dataset[int(document)] for document in dataset.document_index])
    for index in (0, 7, 19):
        start = int(dataset.shuffle_index[index]) * 32
        assert sample_ids(dataset, index).tolist() == tokens[start : start + 33].tolist()
