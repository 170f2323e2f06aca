"""A small run with live adapters and its export, and a text of several documents."""

import json
from pathlib import Path

import pytest
from small_corpus import REPOSITORY
from small_run import small_config

from megatron_step.config.data import DataConfig
from megatron_step.huggingface.to_hf import ExportOptions, export_model
from megatron_step.training.run import run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, small_data: DataConfig) -> Path:
    """The output folder of a run of two stages."""
    output = tmp_path_factory.mktemp("trained")
    stages = {"count": 2, "layers": [3, 1], "steps": [6, 12]}
    assert run(small_config(str(output), data=small_data, stages=stages, checkpoint={"interval": 0}))
    return output


@pytest.fixture(scope="session")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of the trained run, exported as a Hugging Face model."""
    out = tmp_path_factory.mktemp("exported") / "model"
    export_model(trained, out, ExportOptions())
    return out


@pytest.fixture(scope="session")
def paragraphs() -> list[str]:
    """Some paragraphs, of which none was trained on."""
    text = (REPOSITORY / "examples/data/austen.txt").read_text(encoding="utf-8")
    return [paragraph for paragraph in text[-3000:-200].split("\n\n") if paragraph.strip()] + ["Café, Ωμέγα."]


@pytest.fixture(scope="session")
def text_file(paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The paragraphs as .jsonl, a document each."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": paragraph}) + "\n" for paragraph in paragraphs), encoding="utf-8")
    return path
