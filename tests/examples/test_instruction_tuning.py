"""Both models are tuned on answers alone, stay models of transformers with a chat template, and stand side by side."""

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
from megatron_step.training.run import run

_FOLDER = REPOSITORY / "examples/instruction_tuning"
needs_trl = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason='TRL is not installed: pip install -e ".[trl]"'
)


def _pairs(name: str, folder: Path = _FOLDER) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_shipped_pairs_are_made_again_and_none_is_in_both_files(tmp_path: Path) -> None:
    subprocess.run([sys.executable, _FOLDER / "make_pairs.py", tmp_path], check=True, timeout=60)
    for name, count in (("train", 720), ("held_out", 300)):
        assert _pairs(name) == _pairs(name, tmp_path)
        assert len(_pairs(name)) == count
    asked = {name: {pair["prompt"][0]["content"] for pair in _pairs(name)} for name in ("train", "held_out")}
    assert not asked["train"] & asked["held_out"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, small_data: DataConfig) -> dict[str, Path]:
    """Two tiny runs of equal size, one of them in two stages."""
    folder, model = tmp_path_factory.mktemp("runs"), {"num_layers": 2, "seq_length": 192}
    stages = {"step": {"count": 2, "layers": [1, 1], "steps": [2, 2]}, "vanilla": {}}
    for name, section in stages.items():
        config = small_config(
            str(folder / name), data=small_data, model=model, steps=4, stages=section, checkpoint={"interval": 0}
        )
        assert run(config)
    return {name: folder / name for name in stages}


@needs_trl
def test_both_are_tuned_and_can_be_talked_to(
    runs: dict[str, Path], tmp_path: Path, run_copy: Callable[..., str]
) -> None:
    text = run_copy("instruction_tuning", f"{runs['vanilla']} {runs['step']}", STEPS="3")
    out = tmp_path / "runs/instruction_tuning"
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    for name in ("vanilla", "step"):
        before, after = (results[name][moment] for moment in ("before", "after"))
        assert after["loss"] < before["loss"]
        assert f"{before['loss']:.3f} → {after['loss']:.3f}" in text
        assert f"{before['perplexity']:.1f} → {after['perplexity']:.1f}" in text

        model = AutoModelForCausalLM.from_pretrained(out / "tuned" / name)
        tokenizer = AutoTokenizer.from_pretrained(out / "tuned" / name)
        assert _answer_loss(model, tokenizer) == pytest.approx(after["loss"], rel=1e-4)
        ids = tokenizer.apply_chat_template(_pairs("held_out")[0]["prompt"], add_generation_prompt=True)["input_ids"]
        assert tokenizer.convert_ids_to_tokens([ids[0], ids[-1]]) == ["<|user|>", "<|assistant|>"]
        written = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=16, max_length=None)[0]
        question, answer = next(iter(after["answers"].items()))
        assert question == _pairs("held_out")[0]["prompt"][0]["content"]
        assert tokenizer.decode(written[len(ids) :], skip_special_tokens=True).strip() == answer


@torch.no_grad()
def _answer_loss(model: torch.nn.Module, tokenizer: Callable) -> float:
    """-ln p of an answer's tokens, its end included, over all held-out answers: each dialogue alone, written out."""
    nats, count = 0.0, 0
    for pair in _pairs("held_out"):
        prompt = f"<|user|>{pair['prompt'][0]['content']}<|assistant|>"
        first = len(tokenizer(prompt).input_ids)
        ids = torch.tensor(tokenizer(f"{prompt}{pair['completion'][0]['content']}</s>").input_ids)  # [s]
        log_p = model(ids[None]).logits[0, first - 1 : -1].log_softmax(-1)  # [answer, v]
        nats -= float(log_p.gather(-1, ids[first:, None]).sum())
        count += len(ids) - first
    return nats / count


@needs_trl
def test_bad_input_is_one_line_before_any_work(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("tune", _FOLDER / "tune.py")
    assert spec
    assert spec.loader
    tune = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tune)

    def refused(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["tune.py", *map(str, arguments), "--text", "unused"])
        assert tune.main() == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return error

    missing = refused(runs["vanilla"], tmp_path / "nowhere", "--output", tmp_path / "out")
    assert "nowhere: make demo leaves" in missing
    assert not (tmp_path / "out").exists()
    assert "already exists" in refused(runs["vanilla"], runs["step"], "--output", tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert 'pip install -c constraints.txt -e ".[trl]"' in refused(runs["vanilla"], runs["step"], "--output", "unused")
