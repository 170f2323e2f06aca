"""A checkpoint shows the loss that its run measured."""

import json
from pathlib import Path

import pytest
from small_run import small_config

from megatron_step.config.data import DataConfig
from megatron_step.training.inspection import checkpoint_loss, open_checkpoint
from megatron_step.training.run import run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, small_data: DataConfig) -> Path:
    output = tmp_path_factory.mktemp("trained")
    assert run(small_config(str(output), data=small_data, steps=6, evaluation={"interval": 0, "steps": 2}))
    return output


def test_the_loss_is_that_of_the_run(trained: Path) -> None:
    measured = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])["validation_loss"]
    with open_checkpoint(trained) as inspected:
        assert inspected.found.path.name == "step_00000006"
        assert checkpoint_loss(inspected) == pytest.approx(measured, rel=1e-6)
    with open_checkpoint(trained / "checkpoints/step_00000005") as inspected:
        assert checkpoint_loss(inspected) != pytest.approx(measured, rel=1e-6)


def test_the_loss_of_a_grown_model_is_that_with_its_adapters(tmp_path: Path, small_data: DataConfig) -> None:
    sections = {"evaluation": {"interval": 0, "steps": 2}, "stages": {"count": 2, "layers": [3, 1], "steps": [4, 6]}}
    assert run(small_config(str(tmp_path), data=small_data, **sections))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    measured = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    assert list(measured) == [3, 9]
    for step, loss in measured.items():
        with open_checkpoint(tmp_path / f"checkpoints/step_{step:08d}") as inspected:
            assert len(inspected.chunks[0].decoder.layers) == {3: 3, 9: 4}[step]
            # Merged once into fp32 weights: the rounding of a few additions.
            assert checkpoint_loss(inspected) == pytest.approx(loss, rel=1e-5)


def test_a_folder_without_checkpoints_says_so(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="has no checkpoint yet"), open_checkpoint(tmp_path):
        pass
