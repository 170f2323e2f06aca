"""A checkpoint and its export write the same text, which is transformers' own where nothing is drawn."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_step.evaluation.generation import generate
from megatron_step.evaluation.models import open_model

_DRAWS = [(0.0, 1), (0.0, 2), (1.0, 1), (1.0, 1), (1.0, 2)]


def test_text_follows_from_model_seed_and_temperature(trained: Path, exported: Path) -> None:
    written = []
    for path in (trained, exported):
        with open_model(path) as model:
            written.append([generate(model, "Emma was", 12, temperature, seed) for temperature, seed in _DRAWS])
            assert len(generate(model, "Emma was", 60, 1.0, 1)) > len(written[-1][2]), "beyond a window of 32 tokens"
    assert written[0] == written[1]
    texts = written[0]
    assert all(text.startswith("Emma was") for text in texts)
    assert texts[0] == texts[1], "the likeliest tokens need no seed"
    assert texts[2] == texts[3] != texts[4]
    tokenizer = AutoTokenizer.from_pretrained(exported)
    model = AutoModelForCausalLM.from_pretrained(exported)
    prompt = torch.tensor([tokenizer("Emma was")["input_ids"]])
    theirs = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
    assert texts[0] == tokenizer.decode(theirs[0], skip_special_tokens=True)
