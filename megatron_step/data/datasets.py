"""Training and validation datasets of fixed samples, by megatron-core's GPTDataset and its blends."""

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

from megatron_step.config.data import DataConfig, DataPart
from megatron_step.data.check import Corpus, check_corpora
from megatron_step.data.fingerprint import data_fingerprint
from megatron_step.data.indexed_format import HEADER, corpus_paths
from megatron_step.data.tokenizer import Tokenizer
from megatron_step.engine.agreement import current_ranks
from megatron_step.engine.compat.datasets import sample_ids


class Datasets(NamedTuple):
    """Datasets whose samples are `{"tokens": [s], "labels": [s]}`, int64; labels are the tokens one position later."""

    train: Dataset[dict[str, torch.Tensor]] | None
    validation: Dataset[dict[str, torch.Tensor]] | None


class TokenDataset(GPTDataset):
    """GPTDataset without the masks and position ids, which are the same for every sample."""

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        """`tokens` and `labels`, both [s] int64, views of the same s + 1 ids."""
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
    """Build the datasets, on all ranks together; None where there is nothing, and where `is_built_on_rank` is false.

    `num_train_samples` is the budget of the whole run: another budget gives another order. Rank 0 writes the index
    files first, all or none of them, to `config.cache_dir`, which all ranks must see, under a name made of the
    data's fingerprint. Without a process group, a group of this one process is made for the time of the call.

    Raises FileNotFoundError and ValueError for unusable corpora (see `check_corpus`) and for one with fewer tokens than
    a sample has.
    """
    if num_train_samples < 1 or num_validation_samples < 0:
        raise ValueError(f"asked for {num_train_samples} training and {num_validation_samples} validation samples")
    parts = [_Part.of("train", config, num_train_samples)]
    if config.has_validation and num_validation_samples > 0:
        parts.append(_Part.of("validation", config, num_validation_samples))
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
                        f"{cache} is missing: data.cache_dir must be on a file system that all ranks see"
                    )
            datasets[part.name] = _build(part, config, tokenizer, seq_length, cache, is_built_on_rank)
    return Datasets(datasets["train"], datasets.get("validation"))


def repeated_validation(config: DataConfig, seq_length: int, num_samples: int) -> list[str]:
    """Say which corpora a validation set of `num_samples` samples reads more than once; they have been checked."""
    if not (config.has_validation and num_samples > 0):
        return []
    part = _Part.of("validation", config, num_samples)
    total = sum(weight for weight, _ in part.corpora)
    lines = []
    for weight, prefix in part.corpora:
        with corpus_paths(prefix).idx.open("rb") as index:
            num_documents = HEADER.unpack(index.read(HEADER.size))[3]
        _, tokens = _size(part, prefix, num_documents)
        samples, whole = math.ceil(weight / total * num_samples), (tokens - 1) // seq_length
        if samples > whole:
            lines.append(
                f"evaluation.steps takes {samples:,} samples of {prefix}, whose {tokens:,} tokens hold {whole:,} of "
                f"model.seq_length {seq_length:,}: some are read more than once"
            )
    return lines


class _Part(NamedTuple):
    """What one dataset is made of. Each is built by itself, so that validation cannot change the order of training."""

    name: DataPart
    corpora: list[tuple[float, str]]
    begin: float
    end: float
    """The share of each corpus's documents that it takes, from `begin` to `end`."""
    num_samples: int

    @staticmethod
    def of(name: DataPart, config: DataConfig, num_samples: int) -> "_Part":
        """The corpora or the share of them that `config` gives to training or validation."""
        if config.split is not None:
            boundary = config.split[0] / sum(config.split)
            begin, end = (0.0, boundary) if name == "train" else (boundary, 1.0)
            return _Part(name, config.train, begin, end, num_samples)
        return _Part(name, config.train if name == "train" else config.validation or [], 0.0, 1.0, num_samples)


def _build_cache(part: _Part, config: DataConfig, tokenizer: Tokenizer, seq_length: int, cache: Path) -> None:
    """Have rank 0 write the index files, all or none of them; the other ranks take part in megatron-core's barriers."""
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
        except Exception as error:  # megatron-core wraps an OSError in a plain Exception
            cause = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(cause, OSError):
                raise
            raise OSError(
                f"cannot write index files of the data below {cache.parent} ({cause}): set data.cache_dir"
            ) from error
        finally:
            shutil.rmtree(being_built, ignore_errors=True)
    dist.barrier()


def _build(
    part: _Part, config: DataConfig, tokenizer: Tokenizer, seq_length: int, cache: Path, built_here: bool
) -> Dataset[dict[str, torch.Tensor]] | None:
    """One dataset by megatron-core's builder, as its training split, which is the first of three."""
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
    """What GPTDataset asks of a tokenizer. It has no padding token: samples are always full."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.vocab_size = tokenizer.vocab_size
        self.eod = tokenizer.eod_id
        self.unique_identifiers = {"fingerprint": tokenizer.fingerprint}


def _surplus(part: _Part) -> float:
    """Share of samples to build beyond a corpus's own, so that the blend finds them all.

    Of a blend of k corpora and n samples, megatron-core builds ceil(ceil(w n) (1 + surplus)) samples of the corpus with
    weight w, and the blend, of up to n + k samples, draws up to w (n + k) + 1 of them: for small n its default of 0.005
    is too little.
    """
    total = sum(weight for weight, _ in part.corpora)
    shares = [weight / total for weight, _ in part.corpora]
    return max(0.005, *((share * len(shares) + 1) / math.ceil(share * part.num_samples) for share in shares))


def _check_enough(part: _Part, corpora: dict[str, Corpus], seq_length: int) -> None:
    """Raise ValueError for a corpus, or a share of one, that cannot fill one sample of `seq_length` + 1 tokens."""
    for _, prefix in part.corpora:
        documents, tokens = _size(part, prefix, corpora[prefix].documents)
        if tokens < seq_length + 1:
            raise ValueError(
                f"{prefix} has {tokens:,} tokens in {documents:,} documents for {part.name}, a sample of seq_length "
                f"{seq_length:,} needs {seq_length + 1:,}: give more text, a smaller seq_length or another data.split"
            )


def _size(part: _Part, prefix: str, num_documents: int) -> tuple[int, int]:
    """Documents of a corpus that a part takes, and their tokens."""
    first, last = round(part.begin * num_documents), round(part.end * num_documents)  # as megatron-core rounds
    lengths = np.memmap(corpus_paths(prefix).idx, "<i4", "r", HEADER.size, (num_documents,))
    return last - first, int(lengths[first:last].sum(dtype=np.int64))


def _cache_folder(part: _Part, config: DataConfig, tokenizer: Tokenizer, seq_length: int) -> Path:
    """Where the index files of exactly this dataset lie: a corpus made again at the same path gets another folder."""
    parent = Path(config.cache_dir) if config.cache_dir else Path(config.train[0][1]).parent / "cache"
    described = [part, data_fingerprint(config, tokenizer, seq_length, part.num_samples)]
    return parent / f"{part.name}_{hashlib.sha256(json.dumps(described).encode()).hexdigest()[:24]}"


def _publish(built: Path, cache: Path) -> None:
    """Give the complete index files their name, unless another run was faster with the same ones."""
    try:
        os.rename(built, cache)
    except OSError:
        if not cache.is_dir():
            raise


@contextmanager
def _process_group() -> Iterator[None]:
    """megatron-core's blends ask for this process's rank: where there is no group, a group of one."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
