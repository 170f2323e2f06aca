import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from megatron_step.data.preprocess import preprocess
from megatron_step.data.tokenizer import Tokenizer

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_data.py"


@pytest.fixture
def source(tmp_path: Path, text: str) -> Path:
    """200 documents, one of them long enough to be cut in pieces, one of a single character."""
    folder = tmp_path / "source"
    folder.mkdir()
    texts = [*text.split("\n\n"), "x", text * 5]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in texts), encoding="utf-8")
    return folder / "a.jsonl"


def corpus_bytes(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}.{suffix}").read_bytes() for suffix in ("bin", "idx", "json")]


def run_tool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_same_bytes_as_a_plain_loop_over_megatrons_builder(
    tmp_path: Path, source: Path, tokenizer: Tokenizer, tokenizer_path: str, workers: int
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    texts = [json.loads(line)["text"] for line in source.read_text(encoding="utf-8").splitlines()]
    for one in texts:
        ids = [*tokenizer.encode(one), tokenizer.eod_id]
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(tmp_path / "theirs.idx"))

    summary = preprocess([source], tmp_path / "ours", tokenizer_path, workers=workers)
    assert corpus_bytes(tmp_path / "ours")[:2] == [(tmp_path / f"theirs.{end}").read_bytes() for end in ("bin", "idx")]
    corpus = IndexedDataset(str(tmp_path / "ours"))
    assert [tokenizer.decode(document[:-1].tolist()) for document in corpus] == texts
    assert summary.documents == len(corpus) == len(texts) and summary.skipped == {}
    assert summary.tokens == sum(map(len, corpus))


def test_nothing_depends_on_the_number_of_workers(tmp_path: Path, source: Path, tokenizer_path: str) -> None:
    for workers in (1, 4):
        preprocess([source], tmp_path / str(workers), tokenizer_path, workers=workers)
    assert corpus_bytes(tmp_path / "1") == corpus_bytes(tmp_path / "4")


def test_side_file(tmp_path: Path, source: Path, tokenizer: Tokenizer, tokenizer_path: str) -> None:
    with source.open("ab") as file:
        file.write(b'{"text": ""}\n{"text": "\xff"}\n{"text": " "}\n')
    summary = preprocess([source], tmp_path / "a", tokenizer_path, skip_invalid=True)
    side = json.loads((tmp_path / "a.json").read_text())
    assert side["tokenizer"] == {
        "name": "tokenizer.model",
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": 500,
        "eod_id": 2,
    }
    assert side["sources"] == [{"name": "a.jsonl", "bytes": source.stat().st_size}]
    assert side["skipped"] == summary.skipped == {"empty text": 2, "invalid UTF-8": 1}
    assert (side["documents"], side["tokens"]) == (summary.documents, summary.tokens)


def test_large_vocabulary_takes_four_bytes(tmp_path: Path, source: Path, tokenizer_path: str) -> None:
    import tokenizers

    words = {f"w{index}": index for index in range(70_000)} | {"</s>": 70_000}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (tmp_path / "hf").mkdir()
    backend.save(str(tmp_path / "hf" / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("w5 w69999")
    preprocess([tmp_path / "a.txt"], tmp_path / "a", str(tmp_path / "hf"))
    assert np.fromfile(tmp_path / "a.bin", "<i4").tolist() == [5, 69_999, 70_000]


def test_progress_reaches_the_total(tmp_path: Path, source: Path, tokenizer_path: str) -> None:
    packed = source.with_suffix(".jsonl.gz")
    packed.write_bytes(gzip.compress(source.read_bytes()))
    seen: list[tuple[int, int]] = []
    preprocess([source, packed], tmp_path / "a", tokenizer_path, progress=lambda *now: seen.append(now))
    total = source.stat().st_size + packed.stat().st_size
    assert {of for _, of in seen} == {total} and seen[-1][0] == total
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefix": "."}, "is a folder"),
        ({"prefix": "a/"}, "is a folder"),
        ({"separator": ""}, "separator is empty"),
        ({"workers": 0}, "--workers is 0"),
        ({"key": "body"}, "there is no key 'body'"),
        ({"tokenizer_path": "nowhere"}, "the tokenizer nowhere does not exist"),
        ({"inputs": ["nowhere.txt"]}, "the input nowhere.txt does not exist"),
        ({"inputs": ["blank.jsonl"]}, r"holds no document \(skipped: nothing\)"),
        ({"inputs": ["bad.jsonl"], "skip_invalid": True}, r"holds no document \(skipped: \{'invalid JSON': 1\}\)"),
    ],
)
def test_bad_input_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: Path,
    tokenizer_path: str,
    changes: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("blank.jsonl").write_text("\n\n")
    Path("bad.jsonl").write_text("{\n")
    before = sorted(tmp_path.iterdir())
    arguments = {"inputs": [source], "prefix": "a", "tokenizer_path": tokenizer_path, **changes}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        preprocess(**arguments)
    assert sorted(tmp_path.iterdir()) == before


def test_tool(tmp_path: Path, text: str, tokenizer: Tokenizer, tokenizer_path: str) -> None:
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    arguments = ["--input", tmp_path / "a.txt", "--tokenizer", tokenizer_path, "--output", tmp_path / "deep" / "a"]
    done = run_tool(*arguments, "--document-separator", r"\n\n", "--workers", "2")
    assert done.returncode == 0 and done.stderr == ""
    assert "a: 200 documents, " in done.stdout
    ids = np.fromfile(tmp_path / "deep" / "a.bin", "<u2").tolist()
    assert tokenizer.decode(ids) == text.replace("\n\n", "")


@pytest.mark.parametrize(
    ("content", "message"), [(b"\xff\n", "a.txt, byte 0: invalid UTF-8"), (b"", "a.txt is empty"), (b"\n", "no text")]
)
def test_tool_reports_bad_text_in_one_line(tmp_path: Path, tokenizer_path: str, content: bytes, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    failed = run_tool("--input", tmp_path / "a.txt", "--tokenizer", tokenizer_path, "--output", tmp_path / "a")
    assert failed.returncode == 2
    assert failed.stderr.startswith("preprocess_data.py: error: ") and failed.stderr.count("\n") == 1
    assert message in failed.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_run_leaves_no_corpus_and_no_process(
    tmp_path: Path, text: str, tokenizer_path: str, stop: signal.Signals
) -> None:
    (tmp_path / "a.txt").write_text(text * 1000, encoding="utf-8")
    arguments = ["--input", tmp_path / "a.txt", "--tokenizer", tokenizer_path, "--output", tmp_path / "a"]
    run = subprocess.Popen(
        [sys.executable, str(TOOL), *map(str, arguments), "--workers", "2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a shell in the background passes it on ignored
    )
    written = tmp_path / "a.bin.tmp"
    while not (written.exists() and written.stat().st_size > 100_000):
        assert run.poll() is None
        time.sleep(0.01)
    workers = psutil.Process(run.pid).children(recursive=True)
    assert len(workers) >= 2
    os.kill(run.pid, stop)
    assert run.wait(timeout=60) != 0
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
    assert not any((tmp_path / f"a.{suffix}").exists() for suffix in ("bin", "idx", "json"))
    (tmp_path / "a.txt").write_text("short", encoding="utf-8")
    assert run_tool(*arguments).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx", "a.json", "a.txt"]
