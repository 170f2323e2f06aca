import json
from pathlib import Path

import pytest

from megatron_step.checkpoint.manifest import (
    DamagedCheckpointError,
    Manifest,
    content_files,
    damage,
    file_table,
    read_manifest,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of two files and their manifest."""
    (tmp_path / "a.distcp").write_bytes(bytes(range(256)) * 40)
    (tmp_path / ".metadata").write_bytes(b"short")
    manifest = Manifest(
        step=7,
        stage_index=1,
        consumed_samples=56,
        vocab_size=250,
        config={"output_dir": "runs/x", "model": {"num_layers": 4}},
        plan={"stages": [{"index": 0}, {"index": 1}]},
        data_fingerprint={"seed": 1},
        layout={"tensor_parallel_size": 2},
        files=file_table(tmp_path, content_files(tmp_path)),
    )
    manifest.write(tmp_path)
    return tmp_path


def test_manifest_comes_back_as_it_was_written(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert (manifest.step, manifest.stage_index, manifest.consumed_samples, manifest.vocab_size) == (7, 1, 56, 250)
    assert manifest.config["model"] == {"num_layers": 4}
    assert manifest.plan == {"stages": [{"index": 0}, {"index": 1}]}
    assert manifest.layout == {"tensor_parallel_size": 2}
    assert set(manifest.files) == {"a.distcp", ".metadata"}
    assert manifest.files["a.distcp"][0] == 10240
    assert damage(folder, manifest.files, manifest.files) is None


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[5000] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "10,239 bytes instead of 10,240"),
        (flip_bit, "checksum"),
        (Path.unlink, "No such file"),
    ],
    ids=["truncated", "flipped bit", "missing"],
)
def test_damage_is_told_by_file(folder: Path, spoil, words: str) -> None:
    files = read_manifest(folder).files
    spoil(folder / "a.distcp")
    problem = damage(folder, files, files)
    assert problem is not None
    assert words in problem
    assert str(folder / "a.distcp") in problem
    assert damage(folder, files, [".metadata"]) is None


def test_missing_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(DamagedCheckpointError, match="not a complete checkpoint"):
        read_manifest(folder)


@pytest.mark.parametrize("keep", [0, 1, 50])
def test_cut_off_manifest(folder: Path, keep: int) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:keep])
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.json cannot be read"):
        read_manifest(folder)


@pytest.mark.parametrize("change", [{"format": 1}, {"step": None}, {"plan": None}, {"files": {"a": 1}}])
def test_manifest_of_another_make(folder: Path, change: dict) -> None:
    path = folder / "manifest.json"
    values = json.loads(path.read_text()) | change
    values = {name: value for name, value in values.items() if value is not None}
    path.write_text(json.dumps(values))
    with pytest.raises(DamagedCheckpointError):
        read_manifest(folder)
