"""Every example's config can be read and fits the world that its script starts."""

from pathlib import Path

import pytest
from small_corpus import REPOSITORY

from megatron_step.config.load import load_config
from megatron_step.config.run import check_world

_RANKS = {"austen": 2, "step": 1, "learning_curve": 1, "one_machine": 8, "multi_node": 32, "slurm": 32, "real_model": 1}
_FOLDERS = sorted(path.parent for path in (REPOSITORY / "examples").glob("*/config.yaml"))


@pytest.mark.parametrize("folder", _FOLDERS, ids=lambda folder: folder.name)
def test_a_config_fits_its_world(folder: Path) -> None:
    config = load_config(["--config", str(folder / "config.yaml")])
    check_world(config, _RANKS[folder.name])
    assert config.output_dir.split("/")[:2] == ["runs", folder.name]


@pytest.mark.parametrize("folder", _FOLDERS, ids=lambda folder: folder.name)
def test_an_example_has_a_script_and_explains_itself(folder: Path) -> None:
    (script,) = folder.glob("run.s*")
    assert script.stat().st_mode & 0o111
    assert script.name in (folder / "README.md").read_text(encoding="utf-8")
