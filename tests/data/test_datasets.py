import os
import socket
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from megatron_step.config.data import DataConfig
from megatron_step.data.datasets import build_datasets, repeated_validation
from megatron_step.data.preprocess import preprocess
from megatron_step.data.tokenizer import Tokenizer, load_tokenizer

SEQ = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, text: str, tokenizer_path: str) -> Path:
    """Corpora a (150 documents), b (50 documents), one (1 document), tiny (a few tokens)."""
    folder = tmp_path_factory.mktemp("data")
    parts = text.split("\n\n")
    contents = {"a": parts[:150], "b": parts[150:], "one": ["".join(parts)], "tiny": ["x"]}
    for name, documents in contents.items():
        (folder / f"{name}.txt").write_text("\n\n".join(documents), encoding="utf-8")
        preprocess([folder / f"{name}.txt"], folder / name, tokenizer_path, separator="\n\n")
    return folder


@pytest.fixture
def config(folder: Path, tmp_path: Path, tokenizer_path: str) -> DataConfig:
    train = [(1.0, str(folder / "a")), (3.0, str(folder / "b"))]
    validation = [(1.0, str(folder / "b"))]
    return DataConfig(train=train, validation=validation, tokenizer=tokenizer_path, cache_dir=str(tmp_path / "cache"))


def samples(dataset: torch.utils.data.Dataset, count: int | None = None) -> torch.Tensor:
    """The first `count` samples' tokens and last label. [count, s + 1]"""
    items = [dataset[index] for index in range(len(dataset) if count is None else count)]
    for item in items:
        assert item["tokens"].dtype == item["labels"].dtype == torch.int64
        assert item["tokens"][1:].equal(item["labels"][:-1])
    return torch.stack([torch.cat([item["tokens"], item["labels"][-1:]]) for item in items])


def test_one_corpus_is_gone_through_once_an_epoch(config: DataConfig, folder: Path, tokenizer: Tokenizer) -> None:
    config = replace(config, train=[(1.0, str(folder / "one"))], validation=None)
    train, validation = build_datasets(config, SEQ, tokenizer, 10, 0)
    assert validation is None
    tokens = np.fromfile(folder / "one.bin", "<u2").astype(np.int64)
    count = (len(tokens) - 1) // SEQ
    assert len(train) == count
    expected = [tokens[start : start + SEQ + 1].tolist() for start in range(0, count * SEQ, SEQ)]
    assert sorted(samples(train).tolist()) == sorted(expected)


def test_blend_follows_the_weights(config: DataConfig, folder: Path, tokenizer: Tokenizer) -> None:
    train, validation = build_datasets(config, SEQ, tokenizer, 400, 20)
    assert len(train) >= 400 and len(validation) >= 20
    shares = np.bincount([int(train[index]["dataset_id"]) for index in range(400)]) / 400
    assert abs(shares[1] - 0.75) < 0.01


def test_same_call_same_samples_and_a_seed_decides(config: DataConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    train, validation = build_datasets(config, SEQ, tokenizer, 400, 20)
    again, validation_again = build_datasets(config, SEQ, tokenizer, 400, 20)
    elsewhere, _ = build_datasets(replace(config, cache_dir=str(tmp_path / "other")), SEQ, tokenizer, 400, 20)
    other, _ = build_datasets(replace(config, seed=2), SEQ, tokenizer, 400, 20)
    assert samples(train, 400).equal(samples(again, 400)) and samples(train, 400).equal(samples(elsewhere, 400))
    assert samples(validation, 20).equal(samples(validation_again, 20))
    assert not samples(train, 400).equal(samples(other, 400))
    assert not dist.is_initialized()


def test_split_shares_no_document(config: DataConfig, folder: Path, tokenizer: Tokenizer) -> None:
    config = replace(config, train=[(1.0, str(folder / "a"))], validation=None, split=(90, 10))
    train, validation = build_datasets(config, SEQ, tokenizer, 10, 10)
    index = np.memmap(folder / "a.idx", "<i4", "r", 34, (150,))
    first_validation_token = int(index[:135].sum())
    tokens = np.fromfile(folder / "a.bin", "<u2").astype(np.int64)
    text_of = load_tokenizer(config.tokenizer).decode
    held_out, rest = (
        text_of(tokens[first_validation_token:].tolist()),
        text_of(tokens[:first_validation_token].tolist()),
    )
    documents = [part for row in samples(validation).tolist() for part in _documents(row)]
    assert all(text_of(part) in held_out for part in documents)
    documents = [part for row in samples(train).tolist() for part in _documents(row)]
    assert all(text_of(part) in rest for part in documents)


def _documents(row: list[int]) -> list[list[int]]:
    """A sample's tokens between end-of-document tokens."""
    parts: list[list[int]] = [[]]
    for index in row:
        parts = [*parts, []] if index == 2 else [*parts[:-1], [*parts[-1], index]]
    return parts


def test_train_does_not_depend_on_whether_there_is_validation(config: DataConfig, tokenizer: Tokenizer) -> None:
    for one in (config, replace(config, validation=None, split=(90, 10))):
        without, validation = build_datasets(one, SEQ, tokenizer, 100, 0)
        assert validation is None
        for num_validation_samples in (1, 10):
            train, validation = build_datasets(one, SEQ, tokenizer, 100, num_validation_samples)
            assert len(validation) >= num_validation_samples
            assert samples(train, 100).equal(samples(without, 100))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.98, 0.01, 0.01), (1000.0, 1.0, 300.0)])
def test_small_blends_never_run_out(
    config: DataConfig, folder: Path, tokenizer: Tokenizer, count: int, weights: tuple[float, ...]
) -> None:
    # A sample that is as long as a corpus: each corpus gives one sample an epoch, and no more than asked for.
    blend = [(weight, str(folder / name)) for weight, name in zip(weights, ("a", "b", "one"), strict=True)]
    shortest = min(os.path.getsize(folder / f"{name}.bin") for name in ("a", "b")) // 2
    train, _ = build_datasets(replace(config, train=blend, validation=None), shortest - 1, tokenizer, count, 0)
    assert len(train) >= count
    samples(train, count)


def test_corpus_made_anew_is_not_read_through_old_index_files(
    config: DataConfig, tmp_path: Path, text: str, tokenizer: Tokenizer
) -> None:
    config = replace(config, train=[(1.0, str(tmp_path / "c"))], validation=None)
    for content in (text, text[: len(text) // 4]):
        (tmp_path / "c.txt").write_text(content, encoding="utf-8")
        preprocess([tmp_path / "c.txt"], tmp_path / "c", config.tokenizer)
        train, _ = build_datasets(config, SEQ, tokenizer, 5, 0)
        assert len(train) == ((tmp_path / "c.bin").stat().st_size // 2 - 1) // SEQ
        samples(train)
    assert len(list((tmp_path / "cache").iterdir())) == 2  # one for each content


def test_too_little_data(config: DataConfig, folder: Path, tokenizer: Tokenizer) -> None:
    tiny, one = str(folder / "tiny"), str(folder / "one")
    with pytest.raises(
        ValueError,
        match=r"tiny has 2 tokens in 1 document for the train set, but a sample of model.seq_length 32 needs 33",
    ):
        build_datasets(replace(config, train=[(1.0, tiny)]), SEQ, tokenizer, 10, 10)
    with pytest.raises(ValueError, match=r"tiny has 2 tokens in 1 document for the validation set"):
        build_datasets(replace(config, validation=[(1.0, tiny)]), SEQ, tokenizer, 10, 10)
    build_datasets(replace(config, validation=[(1.0, tiny)]), SEQ, tokenizer, 10, 0)
    split = replace(config, train=[(1.0, one)], validation=None, split=(99, 1))
    with pytest.raises(ValueError, match=r"one has 0 tokens in 0 documents for the validation set.*change data\.split"):
        build_datasets(split, SEQ, tokenizer, 10, 10)


def test_corpora_are_checked(config: DataConfig, folder: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.bin does not exist"):
        build_datasets(replace(config, train=[(1.0, str(folder / "nowhere"))]), SEQ, tokenizer, 10, 10)


def test_unwritable_cache(config: DataConfig, tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"cannot write the data's index files to .*file.*set data\.cache_dir"):
        build_datasets(replace(config, cache_dir=str(tmp_path / "file")), SEQ, tokenizer, 10, 10)
    assert not dist.is_initialized()


def test_failure_while_index_files_are_written(
    config: DataConfig, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, done = np.save, []

    def full_disk(path: str, array: np.ndarray, **options: object) -> None:
        if len(done) == 4:
            raise OSError(28, "No space left on device")
        done.append(path)
        save(path, array, **options)

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full_disk)
        with pytest.raises(OSError, match="No space left on device"):
            build_datasets(config, SEQ, tokenizer, 10, 10)
    assert list((tmp_path / "cache").iterdir()) == []
    train, _ = build_datasets(config, SEQ, tokenizer, 10, 10)
    samples(train, 10)


def _rank(rank: int, port: int, config: DataConfig, results: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=2)
    tokenizer = load_tokenizer(config.tokenizer)
    on_one = build_datasets(config, SEQ, tokenizer, 100, 10, is_built_on_rank=rank == 1)
    on_both = build_datasets(config, SEQ, tokenizer, 100, 10)
    assert dist.is_initialized()
    torch.save([None if part is None else samples(part, 10) for part in (*on_one, *on_both)], f"{results}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_see_the_same_samples(config: DataConfig, tmp_path: Path, tokenizer: Tokenizer) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port, config, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first[:2] == [None, None]
    alone = [samples(part, 10) for part in build_datasets(config, SEQ, tokenizer, 100, 10)]
    for built in (first[2:], second[:2], second[2:]):
        assert all(one.equal(other) for one, other in zip(built, alone, strict=True))


def test_reading_a_sample_is_cheap(config: DataConfig, tokenizer: Tokenizer) -> None:
    train, _ = build_datasets(config, SEQ, tokenizer, 400, 0)
    best = min(_seconds_a_sample(train) for _ in range(5))
    assert best < 1e-3


def _seconds_a_sample(dataset: torch.utils.data.Dataset) -> float:
    start = time.perf_counter()
    for index in range(200):
        dataset[index]
    return (time.perf_counter() - start) / 200


def test_a_validation_set_that_reads_a_corpus_twice_is_named(config: DataConfig, folder: Path) -> None:
    tokens = (folder / "b.bin").stat().st_size // 2
    whole = (tokens - 1) // SEQ
    assert repeated_validation(config, SEQ, whole) == repeated_validation(config, SEQ, 0) == []
    (warning,) = repeated_validation(config, SEQ, whole + 1)
    assert f"needs {whole + 1:,} samples of {folder / 'b'}, but its {tokens:,} tokens hold {whole:,} of" in warning
    split = replace(config, train=[(1.0, str(folder / "a"))], validation=None, split=(90, 10))
    assert len(repeated_validation(split, SEQ, whole * 3)) == 1
