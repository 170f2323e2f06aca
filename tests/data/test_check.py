import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_step.config.data import DataConfig
from megatron_step.data.check import check_corpora, check_corpus
from megatron_step.data.indexed_format import HEADER
from megatron_step.data.preprocess import preprocess
from megatron_step.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, text: str, tokenizer_path: str) -> dict[str, bytes]:
    """The files of a corpus of 200 documents, by suffix."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.txt").write_text(text, encoding="utf-8")
    preprocess([folder / "a.txt"], folder / "a", tokenizer_path, separator="\n\n")
    return {suffix: (folder / f"a.{suffix}").read_bytes() for suffix in ("bin", "idx", "json")}


def place(folder: Path, files: dict[str, bytes]) -> str:
    for suffix in ("bin", "idx", "json"):
        (folder / f"a.{suffix}").unlink(missing_ok=True)
        if suffix in files:
            (folder / f"a.{suffix}").write_bytes(files[suffix])
    return str(folder / "a")


@pytest.mark.parametrize("side", [True, False])
def test_good_corpus(tmp_path: Path, files: dict[str, bytes], tokenizer: Tokenizer, side: bool) -> None:
    prefix = place(tmp_path, files if side else {key: files[key] for key in ("bin", "idx")})
    corpus = check_corpus(prefix, tokenizer)
    assert (corpus.documents, corpus.tokens) == (200, len(files["bin"]) // 2)
    assert corpus.dtype == np.uint16
    config = DataConfig(train=[(1.0, prefix)], validation=[(1.0, prefix)], tokenizer="")
    assert check_corpora(config, tokenizer) == [corpus]


def test_corpus_of_megatrons_builder(tmp_path: Path, tokenizer: Tokenizer) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    for multimodal in (False, True):
        builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), multimodal=multimodal)
        builder.add_item(torch.arange(10))
        builder.add_item(torch.arange(5))
        builder.end_document()
        builder.finalize(str(tmp_path / "m.idx"))
        corpus = check_corpus(str(tmp_path / "m"), tokenizer)
        assert (corpus.documents, corpus.tokens) == (2, 15)


@pytest.mark.parametrize("missing", ["bin", "idx"])
def test_missing_or_empty_file(tmp_path: Path, files: dict[str, bytes], tokenizer: Tokenizer, missing: str) -> None:
    prefix = place(tmp_path, {key: files[key] for key in files if key != missing})
    with pytest.raises(FileNotFoundError, match=rf"a\.{missing} does not exist.*megatron-step preprocess"):
        check_corpus(prefix, tokenizer)
    with pytest.raises(ValueError, match=rf"a\.{missing} is empty"):
        check_corpus(place(tmp_path, {**files, missing: b""}), tokenizer)


def test_index_cut_anywhere(tmp_path: Path, files: dict[str, bytes], tokenizer: Tokenizer) -> None:
    idx = files["idx"]
    for size in [*range(1, 60), *range(60, len(idx), 97), len(idx) - 1]:
        with pytest.raises(
            ValueError,
            match=rf"a\.idx has [\d,]+ bytes?, but its header (alone needs|says {len(idx):,})",
        ):
            check_corpus(place(tmp_path, {**files, "idx": idx[:size]}), tokenizer)


@pytest.mark.parametrize("change", [-1, 1, 2, -1000])
def test_bin_of_another_size(tmp_path: Path, files: dict[str, bytes], tokenizer: Tokenizer, change: int) -> None:
    size = len(files["bin"])
    content = (files["bin"] + b"\0" * 10)[: size + change]
    with pytest.raises(ValueError, match=rf"a\.bin has {size + change:,} bytes, but a\.idx says {size:,}"):
        check_corpus(place(tmp_path, {**files, "bin": content}), tokenizer)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_changed_byte_of_the_index_is_found(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes], tokenizer: Tokenizer, data: st.DataObject
) -> None:
    idx = bytearray(files["idx"])
    position = data.draw(st.integers(0, len(idx) - 1))
    idx[position] ^= data.draw(st.integers(1, 255))
    in_boundaries = position >= HEADER.size + 12 * 200 + 8 and position < len(idx) - 8
    prefix = place(tmp_path_factory.mktemp("changed"), {**files, "idx": bytes(idx)})
    if in_boundaries:  # boundaries in order may be others
        return
    with pytest.raises(ValueError, match="megatron-step preprocess"):
        check_corpus(prefix, tokenizer)


@pytest.mark.parametrize("code", [0, 6, 7, 9, 255])
def test_no_token_ids(tmp_path: Path, files: dict[str, bytes], tokenizer: Tokenizer, code: int) -> None:
    idx = bytearray(files["idx"])
    idx[17] = code
    with pytest.raises(ValueError, match=f"its dtype code is {code}"):
        check_corpus(place(tmp_path, {**files, "idx": bytes(idx)}), tokenizer)


def test_other_tokenizer(tmp_path: Path, files: dict[str, bytes], tokenizer: Tokenizer) -> None:
    side = json.loads(files["json"])
    side["tokenizer"].update(name="other.model", fingerprint="0" * 64)
    with pytest.raises(ValueError, match=r"tokenized with other\.model \(000000000000\), not with .*tokenizer\.model"):
        check_corpus(place(tmp_path, {**files, "json": json.dumps(side).encode()}), tokenizer)


def test_side_file_of_another_corpus(tmp_path: Path, files: dict[str, bytes], tokenizer: Tokenizer) -> None:
    side = {**json.loads(files["json"]), "documents": 7}
    with pytest.raises(ValueError, match=r"a\.json describes 7 documents .*, but the corpus has 200"):
        check_corpus(place(tmp_path, {**files, "json": json.dumps(side).encode()}), tokenizer)


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b"\xff", b'{"tokenizer": 1, "documents": 1, "tokens": 1}'])
def test_damaged_side_file(tmp_path: Path, files: dict[str, bytes], tokenizer: Tokenizer, content: bytes) -> None:
    with pytest.raises(ValueError, match=r"a\.json is damaged"):
        check_corpus(place(tmp_path, {**files, "json": content}), tokenizer)


@pytest.mark.parametrize("position", [0, 5000, -1])
def test_ids_beyond_the_vocabulary_without_side_file(
    tmp_path: Path, files: dict[str, bytes], tokenizer: Tokenizer, position: int
) -> None:
    tokens = np.frombuffer(files["bin"], "<u2").copy()
    tokens[position] = 500
    prefix = place(tmp_path, {"bin": tokens.tobytes(), "idx": files["idx"]})
    with pytest.raises(ValueError, match=r"a\.bin holds the token id 500, but .*tokenizer\.model has 500 tokens"):
        check_corpus(prefix, tokenizer)
