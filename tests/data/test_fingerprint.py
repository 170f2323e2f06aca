import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_step.config.data import DataConfig
from megatron_step.data.fingerprint import check_fingerprint, data_fingerprint
from megatron_step.data.preprocess import preprocess
from megatron_step.data.tokenizer import Tokenizer


@pytest.fixture
def config(tmp_path: Path, text: str, tokenizer_path: str) -> DataConfig:
    (tmp_path / "data").mkdir()
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    for name in ("a", "b"):
        preprocess([tmp_path / "text.txt"], tmp_path / "data" / name, tokenizer_path, separator="\n\n")
    train = [(1.0, str(tmp_path / "data" / "a")), (3.0, str(tmp_path / "data" / "b"))]
    return DataConfig(train=train, tokenizer=tokenizer_path)


def test_same_data_passes_also_from_json_and_elsewhere(
    tmp_path: Path, config: DataConfig, tokenizer: Tokenizer
) -> None:
    saved = json.loads(json.dumps(data_fingerprint(config, tokenizer, 32, 100)))
    check_fingerprint(saved, data_fingerprint(config, tokenizer, 32, 100))
    shutil.move(tmp_path / "data", tmp_path / "elsewhere")
    moved = [(weight * 10, prefix.replace("/data/", "/elsewhere/")) for weight, prefix in config.train]
    check_fingerprint(saved, data_fingerprint(replace(config, train=moved), tokenizer, 32, 100))


def test_each_difference_is_named(tmp_path: Path, config: DataConfig, tokenizer: Tokenizer) -> None:
    saved = data_fingerprint(config, tokenizer, 32, 100)
    (_, a), (_, b) = config.train
    changes = {
        r"data\.seed: 1 -> 2": (replace(config, seed=2), 32, 100),
        r"data\.seq_length: 32 -> 64": (config, 64, 100),
        r"data\.num_samples: 100 -> 200": (config, 32, 200),
        r"data\.train\[0\]\.weight: 0.25 -> 0.5; data\.train\[1\]\.weight: 0.75 -> 0.5": (
            replace(config, train=[(1.0, a), (1.0, b)]),
            32,
            100,
        ),
        r"data\.train\[0\]\.name: a -> b": (replace(config, train=[(1.0, b), (3.0, a)]), 32, 100),
        r"data\.train: 2 corpora \(a, b\) -> 1 corpora \(a\)": (replace(config, train=[(1.0, a)]), 32, 100),
        r"data\.validation: \[\] -> 1 corpora \(a\)": (replace(config, validation=[(1.0, a)]), 32, 100),
        r"data\.split: None -> \[0\.99, 0\.01\]": (replace(config, split=(99, 1)), 32, 100),
    }
    for message, (changed, seq_length, num_samples) in changes.items():
        with pytest.raises(ValueError, match=message + r".*Restore the old data .* or start a new run"):
            check_fingerprint(saved, data_fingerprint(changed, tokenizer, seq_length, num_samples))


def test_tokenizer(config: DataConfig, tokenizer: Tokenizer) -> None:
    saved = data_fingerprint(config, tokenizer, 32, 100)
    current = {**saved, "tokenizer": "f" * 64}
    with pytest.raises(ValueError, match=rf"data\.tokenizer: {tokenizer.fingerprint[:12]} -> ffffffffffff\."):
        check_fingerprint(saved, current)


@pytest.mark.parametrize("suffix", ["bin", "idx"])
@pytest.mark.parametrize("position", [0, 1000, -1])
def test_one_changed_byte(config: DataConfig, tokenizer: Tokenizer, suffix: str, position: int) -> None:
    saved = data_fingerprint(config, tokenizer, 32, 100)
    path = Path(f"{config.train[1][1]}.{suffix}")
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"data\.train\[1\]\.{suffix}\.hash"):
        check_fingerprint(saved, data_fingerprint(config, tokenizer, 32, 100))


def test_large_files_are_sampled_from_the_first_byte_to_the_last(config: DataConfig, tokenizer: Tokenizer) -> None:
    path = Path(f"{config.train[0][1]}.bin")
    content = bytearray(20 << 20)
    path.write_bytes(content)
    saved = data_fingerprint(config, tokenizer, 32, 100)
    for changed in (slice(0, 1), slice(-1, None), slice(10 << 20, 11 << 20)):
        other = bytearray(content)
        other[changed] = b"\1" * len(other[changed])
        path.write_bytes(other)
        assert data_fingerprint(config, tokenizer, 32, 100) != saved
    path.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match=r"bytes: 20971520 -> 20971521"):
        check_fingerprint(saved, data_fingerprint(config, tokenizer, 32, 100))
