"""No text file, corpus, manifest or metrics file ends in a traceback."""

import bz2
import gzip
import json
import lzma
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from damage import check_survives, damaged_bytes, damaged_tree, examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_run import manifest_facts, small_config

from megatron_step.checkpoint.manifest import Manifest, read_manifest, saved_config
from megatron_step.config.data import DataConfig
from megatron_step.data.check import check_corpus
from megatron_step.data.documents import DocumentReader
from megatron_step.data.text_files import find_text_files
from megatron_step.data.tokenizer import Tokenizer, load_tokenizer
from megatron_step.plan.stages import plan_from_dict
from megatron_step.report.run_report import plot, read_run, stage_table, table

_RECORDS = [{"text": f"document {number} é木😀\n", "meta": {"text": number}} for number in range(6)]
_LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in _RECORDS).encode()


def _parquet(kind: pyarrow.DataType) -> bytes:
    sink = pyarrow.BufferOutputStream()
    text = pyarrow.array([record["text"] for record in _RECORDS], kind)
    pyarrow.parquet.write_table(pyarrow.table({"text": text, "number": range(6)}), sink)
    return sink.getvalue().to_pybytes()


_FILES = {
    "a.txt": "words and more words é木😀\n\n".encode() * 8,
    "b.txt": "words of another system\r\n".encode("utf-16") * 4,
    "a.jsonl": _LINES,
    "a.json": json.dumps(_RECORDS).encode(),
    "b.json": json.dumps(_RECORDS[0], indent=1).encode(),
    "a.jsonl.gz": gzip.compress(_LINES, mtime=0),
    "a.jsonl.zst": zstandard.compress(_LINES),
    "a.txt.bz2": bz2.compress(_LINES),
    "a.json.xz": lzma.compress(_LINES),
    "a.parquet": _parquet(pyarrow.string()),
    "b.parquet": _parquet(pyarrow.dictionary(pyarrow.int32(), pyarrow.string())),
}
_SETTINGS: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def _documents(files: list[Path], skip_invalid: bool, separator: str | None) -> int:
    found = find_text_files(files)
    return sum(piece.ends_document for piece in DocumentReader(found.files, "text", separator, skip_invalid))


def test_the_files_are_read_while_they_are_whole(folder: Path) -> None:
    for name, content in _FILES.items():
        (folder / name).write_bytes(content)
        assert _documents([folder / name], False, None) == (6 if "txt" not in name and name != "b.json" else 1)


@settings(max_examples=examples(600), **_SETTINGS)
@given(
    damaged=st.sampled_from(sorted(_FILES)).flatmap(
        lambda name: st.tuples(st.just(name), damaged_bytes(_FILES[name], sorted(_FILES.values())))
    ),
    skip_invalid=st.booleans(),
    separator=st.none() | st.sampled_from(["\n\n", "words", "\0"]),
)
def test_damaged_and_swapped_text_files(
    folder: Path, damaged: tuple[str, bytes], skip_invalid: bool, separator: str | None
) -> None:
    name, content = damaged
    (folder / name).write_bytes(content)
    check_survives(lambda: _documents([folder / name], skip_invalid, separator))


@settings(max_examples=examples(150), **_SETTINGS)
@given(records=damaged_tree(_RECORDS), as_lines=st.booleans(), skip_invalid=st.booleans())
def test_records_with_other_values(folder: Path, records: Any, as_lines: bool, skip_invalid: bool) -> None:
    path = folder / ("c.jsonl" if as_lines else "c.json")
    lines = (
        [json.dumps(record) for record in records] if as_lines and isinstance(records, list) else [json.dumps(records)]
    )
    path.write_text("\n".join(lines))
    check_survives(lambda: _documents([path], skip_invalid, None))


@pytest.fixture(scope="module")
def tokenizer(small_data: DataConfig) -> Tokenizer:
    return load_tokenizer(small_data.tokenizer)


@settings(max_examples=examples(250), **_SETTINGS)
@given(data=st.data())
def test_corpora(folder: Path, small_data: DataConfig, tokenizer: Tokenizer, data: st.DataObject) -> None:
    prefix = Path(small_data.train[0][1])
    files = {ending: Path(f"{prefix}.{ending}").read_bytes() for ending in ("bin", "idx", "json")}
    broken = data.draw(st.sampled_from(sorted(files)))
    if broken == "idx" and data.draw(st.booleans()):  # the header, where every byte counts
        header = data.draw(damaged_bytes(files["idx"][:40]))
        files["idx"] = header + files["idx"][40:]
    elif broken == "json" and data.draw(st.booleans()):
        files["json"] = json.dumps(data.draw(damaged_tree(json.loads(files["json"])))).encode()
    else:
        files[broken] = data.draw(damaged_bytes(files[broken], [files["bin"][:500], files["json"]]))
    for ending, content in files.items():
        (folder / f"corpus.{ending}").write_bytes(content)
    if data.draw(st.booleans()):
        (folder / "corpus.json").unlink()  # as of a corpus that another tool made
    check_survives(lambda: check_corpus(str(folder / "corpus"), tokenizer))


_MANIFEST = Manifest(step=4, files={"a.distcp": (10, 20)}, **manifest_facts(small_config()))


@settings(max_examples=examples(150), **_SETTINGS)
@given(data=st.data())
def test_manifests_of_checkpoints(folder: Path, data: st.DataObject) -> None:
    whole = json.loads(json.dumps({"format": 2, **asdict(_MANIFEST)}))
    content = json.dumps(whole).encode()
    if data.draw(st.booleans()):
        content = json.dumps(data.draw(damaged_tree(whole))).encode()
    else:
        content = data.draw(damaged_bytes(content))
    (folder / "manifest.json").write_bytes(content)

    def read() -> None:
        manifest = read_manifest(folder)
        saved_config(manifest)
        plan_from_dict(manifest.plan)

    check_survives(read)


_STEPS = [
    {
        "step": step,
        "stage_index": step // 3,
        "loss": 5.0 / step,
        "learning_rate": 1e-3,
        "grad_norm": 1.0,
        "tokens": 100 * step,
        "tokens_per_second": 1000.0,
        **({"validation_loss": 4.0, "validation_perplexity": 54.6} if step == 4 else {}),
        **({"memory": {"planned_bytes": 5, "model_state_bytes": 3, "peak_bytes": 9}} if step in (2, 5) else {}),
    }
    for step in range(1, 6)
]


@settings(max_examples=examples(250), **_SETTINGS)
@given(data=st.data())
def test_metrics_of_runs(folder: Path, data: st.DataObject) -> None:
    lines = data.draw(damaged_tree(_STEPS)) if data.draw(st.booleans()) else _STEPS
    content = "".join(json.dumps(line) + "\n" for line in (lines if isinstance(lines, list) else [lines])).encode()
    (folder / "metrics.jsonl").write_bytes(content if lines is not _STEPS else data.draw(damaged_bytes(content)))

    def read() -> None:
        run = read_run(folder)
        assert table([run]) and stage_table([run])

    check_survives(read)


def test_whole_metrics_are_drawn(folder: Path) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in _STEPS))
    plot([read_run(folder)], folder / "plot.png")
    assert (folder / "plot.png").stat().st_size > 1000
