"""Training and validation datasets of fixed samples, built by megatron-core's GPTDataset and its blends."""

import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from torch.utils.data import Dataset

from megatron_step.config.counts import counted
from megatron_step.config.data import DataConfig, DataPart
from megatron_step.data.check import Corpus, check_corpora
from megatron_step.data.fingerprint import data_fingerprint
from megatron_step.data.indexed_format import HEADER, corpus_paths
from megatron_step.data.tokenizer import Tokenizer
from megatron_step.engine.agreement import current_ranks
from megatron_step.engine.compat.datasets import sample_ids


class Datasets(NamedTuple):
    """Datasets with samples `{"tokens": [s], "labels": [s]}`, int64; labels are the tokens one position later."""

    train: Dataset[dict[str, torch.Tensor]] | None
    validation: Dataset[dict[str, torch.Tensor]] | None


class TokenDataset(GPTDataset):
    """GPTDataset without masks and position ids, which are the same for every sample."""

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        """Return `tokens` and `labels`, both [s] int64, as views of the same s + 1 ids."""
        ids = torch.from_numpy(sample_ids(self, 0 if idx is None else idx))
        return {"tokens": ids[:-1], "labels": ids[1:]}


def build_datasets(
    config: DataConfig,
    seq_length: int,
    tokenizer: Tokenizer,
    num_train_samples: int,
    num_validation_samples: int,
    is_built_on_rank: bool = True,
) -> Datasets:
    """Build the datasets on all ranks together; a dataset is None without samples or if `is_built_on_rank` is false.

    `num_train_samples` is the number for the whole run, on which the order of the samples depends. Rank 0 first writes
    the index files, all or none of them, to a folder in `config.cache_dir` that is named by the data's fingerprint. All
    ranks must see this folder. Without a process group, the call makes one of this process and destroys it at the end.

    Raises FileNotFoundError and ValueError for unusable corpora (see `check_corpus`), and ValueError for a corpus with
    fewer tokens than a sample.
    """
    if num_train_samples < 1 or num_validation_samples < 0:
        raise ValueError(
            f"cannot build {num_train_samples} training samples and {num_validation_samples} validation samples: ask "
            "for at least 1 and 0"
        )
    parts = [_part("train", config, num_train_samples)]
    if config.has_validation and num_validation_samples > 0:
        parts.append(_part("validation", config, num_validation_samples))
    with current_ranks().together():
        corpora = {corpus.prefix: corpus for corpus in check_corpora(config, tokenizer)}
        for part in parts:
            _check_enough(part, corpora, seq_length)
    datasets: dict[str, Dataset[dict[str, torch.Tensor]] | None] = {}
    with _process_group():
        for part in parts:
            cache = _cache_folder(part, config, tokenizer, seq_length)
            _build_cache(part, config, tokenizer, seq_length, cache)
            with current_ranks().together():
                if is_built_on_rank and not cache.is_dir():
                    raise FileNotFoundError(
                        f"{cache} is missing on this rank: set data.cache_dir to a folder that all ranks see"
                    )
            datasets[part.name] = _build(part, config, tokenizer, seq_length, cache, is_built_on_rank)
    return Datasets(datasets["train"], datasets.get("validation"))


def repeated_validation(config: DataConfig, seq_length: int, num_samples: int) -> list[str]:
    """Return a warning for each corpus that a validation set of `num_samples` samples reads more than once.

    The corpora have passed `check_corpora`.
    """
    if not (config.has_validation and num_samples > 0):
        return []
    part = _part("validation", config, num_samples)
    total = sum(weight for weight, _ in part.corpora)
    lines = []
    for weight, prefix in part.corpora:
        with corpus_paths(prefix).idx.open("rb") as index:
            num_documents = HEADER.unpack(index.read(HEADER.size))[3]
        _, tokens = _size(part, prefix, num_documents)
        samples, whole = math.ceil(weight / total * num_samples), (tokens - 1) // seq_length
        if samples > whole:
            lines.append(
                f"evaluation.steps needs {counted(samples, 'sample')} of {prefix}, but its {counted(tokens, 'token')} "
                f"hold {whole:,} of model.seq_length {seq_length:,}: some samples are read more than once"
            )
    return lines


class _Part(NamedTuple):
    """The sources of one dataset. Training and validation are built separately, so that one never changes the other."""

    name: DataPart
    """The dataset's purpose."""
    corpora: list[tuple[float, str]]
    """Pairs of weight and path prefix."""
    begin: float
    """Share of each corpus's documents at which the dataset begins."""
    end: float
    """Share of each corpus's documents at which the dataset ends."""
    num_samples: int
    """Number of samples in the dataset."""


def _part(name: DataPart, config: DataConfig, num_samples: int) -> _Part:
    """Return the corpora, and the share of their documents, that `config` gives to training or validation."""
    if config.split is not None:
        boundary = config.split[0] / sum(config.split)
        begin, end = (0.0, boundary) if name == "train" else (boundary, 1.0)
        return _Part(name, config.train, begin, end, num_samples)
    return _Part(name, config.train if name == "train" else config.validation or [], 0.0, 1.0, num_samples)


def _build_cache(part: _Part, config: DataConfig, tokenizer: Tokenizer, seq_length: int, cache: Path) -> None:
    """Write the index files on rank 0, all or none of them; the other ranks join megatron-core's barriers."""
    if dist.get_rank() != 0:
        _build(part, config, tokenizer, seq_length, cache, False)
    elif cache.is_dir():
        _build(part, config, tokenizer, seq_length, cache, True)
    else:
        being_built = cache.with_name(f"{cache.name}.{uuid.uuid4().hex}.tmp")
        try:
            being_built.mkdir(parents=True)
            _build(part, config, tokenizer, seq_length, being_built, True)
            _publish(being_built, cache)
        except Exception as error:  # megatron-core wraps an OSError in an Exception
            cause = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(cause, OSError):
                raise
            raise OSError(
                f"cannot write the data's index files to {cache.parent} ({cause}): set data.cache_dir to another folder"
            ) from error
        finally:
            shutil.rmtree(being_built, ignore_errors=True)
    dist.barrier()


def _build(
    part: _Part, config: DataConfig, tokenizer: Tokenizer, seq_length: int, cache: Path, built_here: bool
) -> Dataset[dict[str, torch.Tensor]] | None:
    """Build one dataset as the training split, the first of three, of megatron-core's builder."""
    weights, prefixes = zip(*part.corpora, strict=True)
    gpt_config = GPTDatasetConfig(
        random_seed=config.seed,
        sequence_length=seq_length,
        blend=(list(prefixes), list(weights) if len(prefixes) > 1 else None),
        split="1,0,0",
        path_to_cache=str(cache),
        tokenizer=_TokenizerFacts(tokenizer),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        mid_level_dataset_surplus=_surplus(part),
    )
    gpt_config.split_matrix = [(part.begin, part.end), None, None]
    return BlendedMegatronDatasetBuilder(
        TokenDataset, [part.num_samples, 0, 0], lambda: built_here, gpt_config
    ).build()[0]


class _TokenizerFacts:
    """The attributes of a tokenizer that GPTDataset reads; samples are always full, so there is no padding token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.vocab_size = tokenizer.vocab_size
        self.eod = tokenizer.eod_id
        self.unique_identifiers = {"fingerprint": tokenizer.fingerprint}


def _surplus(part: _Part) -> float:
    """Share of extra samples to build from each corpus, so that a blend does not run out of them.

    For a blend of k corpora and n samples, megatron-core builds ceil(ceil(w n) (1 + surplus)) samples of the corpus
    with weight w. The blend has up to n + k samples and draws up to w (n + k) + 1 of that corpus. For small n,
    megatron-core's default surplus of 0.005 is too small.
    """
    total = sum(weight for weight, _ in part.corpora)
    shares = [weight / total for weight, _ in part.corpora]
    return max(0.005, *((share * len(shares) + 1) / math.ceil(share * part.num_samples) for share in shares))


def _check_enough(part: _Part, corpora: dict[str, Corpus], seq_length: int) -> None:
    """Raise ValueError if a corpus, or a part's share of it, has fewer than `seq_length` + 1 tokens."""
    for _, prefix in part.corpora:
        documents, tokens = _size(part, prefix, corpora[prefix].documents)
        if tokens < seq_length + 1:
            raise ValueError(
                f"{prefix} has {counted(tokens, 'token')} in {counted(documents, 'document')} for the {part.name} "
                f"set, but a sample of model.seq_length {seq_length:,} needs {seq_length + 1:,} tokens: add text, "
                "lower model.seq_length or change data.split"
            )


def _size(part: _Part, prefix: str, num_documents: int) -> tuple[int, int]:
    """Numbers of documents and of tokens that a part takes from a corpus."""
    first, last = round(part.begin * num_documents), round(part.end * num_documents)  # as megatron-core rounds
    lengths = np.memmap(corpus_paths(prefix).idx, "<i4", "r", HEADER.size, (num_documents,))
    return last - first, int(lengths[first:last].sum(dtype=np.int64))


def _cache_folder(part: _Part, config: DataConfig, tokenizer: Tokenizer, seq_length: int) -> Path:
    """Return the folder of this dataset's index files; a changed corpus at the same path gets another folder."""
    parent = Path(config.cache_dir) if config.cache_dir else Path(config.train[0][1]).parent / "cache"
    described = [part, data_fingerprint(config, tokenizer, seq_length, part.num_samples)]
    return parent / f"{part.name}_{hashlib.sha256(json.dumps(described).encode()).hexdigest()[:24]}"


def _publish(built: Path, cache: Path) -> None:
    """Rename the folder of complete index files, unless another run has already made the same folder."""
    try:
        os.rename(built, cache)
    except OSError:
        if not cache.is_dir():
            raise


@contextmanager
def _process_group() -> Iterator[None]:
    """Make a process group of this process alone if there is none, because megatron-core's blends ask for the rank."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
