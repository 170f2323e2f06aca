import io

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megatron_step.data import indexed_format
from megatron_step.data.indexed_format import DTYPES, HEADER, IndexWriter, corpus_paths, idx_bytes, token_dtype


def test_dtypes_are_megatrons() -> None:
    assert {code: dtype.type for code, dtype in DTYPES.items()} == {
        member.value: DType.dtype_from_code(member.value) for member in DType
    }
    for vocab_size in (2, 32000, 65499, 65500, 65536, 200_000):
        assert token_dtype(vocab_size).type == DType.optimal_dtype(vocab_size)


@pytest.mark.parametrize("vocab_size", [1000, 100_000])
@pytest.mark.parametrize("block", [1, 3, 1 << 20])
def test_index_is_megatrons_byte_for_byte(
    tmp_path, monkeypatch: pytest.MonkeyPatch, vocab_size: int, block: int
) -> None:
    monkeypatch.setattr(indexed_format, "_BLOCK_DOCUMENTS", block)
    lengths = np.array([5, 1, 1, 700, 2, 9, 1])
    paths = corpus_paths(tmp_path / "theirs")
    builder = IndexedDatasetBuilder(str(paths.bin), dtype=DType.optimal_dtype(vocab_size))
    for length in lengths:
        builder.add_document(torch.zeros(length, dtype=torch.int32), [length])
    builder.finalize(str(paths.idx))

    ours = io.BytesIO()
    writer = IndexWriter(ours, token_dtype(vocab_size))
    writer.add(lengths[:4])
    writer.add(lengths[4:])
    writer.finish()
    assert ours.getvalue() == paths.idx.read_bytes()
    assert len(ours.getvalue()) == idx_bytes(7, 8)


def test_offsets_beyond_32_bits() -> None:
    ours = io.BytesIO()
    writer = IndexWriter(ours, token_dtype(100_000))
    writer.add(np.array([2**31 - 1] * 3))
    writer.finish()
    pointers = np.frombuffer(ours.getvalue(), "<i8", 3, HEADER.size + 3 * 4)
    assert pointers.tolist() == [0, 4 * (2**31 - 1), 8 * (2**31 - 1)]
