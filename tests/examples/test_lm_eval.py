"""lm_eval finds in the exported model the answers that its log-likelihoods, summed here, say."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_corpus import REPOSITORY
from small_run import small_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_step.config.data import DataConfig
from megatron_step.huggingface.to_hf import ExportOptions, export_model
from megatron_step.training.run import run

_FOLDER = REPOSITORY / "examples/lm_eval"
_TASKS = ("austen_ending", "austen_word")
_NUM_ASKED = 25


def _questions(task: str, folder: Path = _FOLDER) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_shipped_questions_are_made_again(tmp_path: Path) -> None:
    subprocess.run([sys.executable, _FOLDER / "make_questions.py", tmp_path], check=True, timeout=60)
    for task in _TASKS:
        questions = _questions(task)
        assert questions == _questions(task, tmp_path)
        assert len(questions) == 400
        assert all(len(set(question["choices"])) == 4 for question in questions)


def test_the_right_answer_is_what_the_book_says() -> None:
    text = " ".join((REPOSITORY / "examples/data/austen.txt").read_text(encoding="utf-8")[-200_000:].split())
    for question in (question for task in _TASKS for question in _questions(task)):
        possible = [f"{question['context']} {choice}" in text for choice in question["choices"]]
        assert possible == [index == question["answer"] for index in range(4)], question


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, small_data: DataConfig) -> Path:
    """A tiny model after some steps, for transformers, with room for the longest question."""
    folder = tmp_path_factory.mktemp("lm_eval")
    model = {"num_layers": 2, "seq_length": 256}
    assert run(small_config(str(folder / "run"), data=small_data, steps=10, model=model, checkpoint={"interval": 0}))
    export_model(folder / "run", folder / "model", ExportOptions())
    return folder / "model"


@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason='lm_eval is not installed: pip install -e ".[lm-eval]"'
)
def test_accuracy_is_that_of_the_log_likelihoods(exported: Path, tmp_path: Path, run_script: Callable) -> None:
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={exported}"]
    command += ["--tasks", ",".join(_TASKS), "--include_path", "examples/lm_eval", "--device", "cpu"]
    command += ["--batch_size", "8", "--limit", str(_NUM_ASKED), "--output_path", str(tmp_path / "results.json")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    finished = run_script(command, **offline)
    assert finished.returncode == 0, finished.stderr
    (file,) = tmp_path.glob("results*.json")
    found = json.loads(file.read_text(encoding="utf-8"))["results"]
    for task in _TASKS:
        accuracy, of_characters = _accuracies(exported, _questions(task)[:_NUM_ASKED])
        assert found[task]["acc,none"] == pytest.approx(accuracy)
        assert found[task]["acc_norm,none"] == pytest.approx(of_characters)
    assert len({value for task in _TASKS for name, value in found[task].items() if name.startswith("acc")}) > 1


@torch.no_grad()
def _accuracies(folder: Path, questions: list[dict]) -> tuple[float, float]:
    """Shares of questions whose right choice has the largest ln p(choice | context), in total and per character."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    right, right_of_characters = 0, 0
    for question in questions:
        sums = []
        for choice in question["choices"]:
            ids = tokenizer(f"{question['context']} {choice}", return_tensors="pt").input_ids  # [1, s]
            first = len(tokenizer(question["context"]).input_ids)
            log_p = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]  # [s - 1]
            sums.append(float(log_p[first - 1 :].sum()))
        mean = [value / len(choice) for value, choice in zip(sums, question["choices"])]
        right += sums.index(max(sums)) == question["answer"]
        right_of_characters += mean.index(max(mean)) == question["answer"]
    return right / len(questions), right_of_characters / len(questions)
