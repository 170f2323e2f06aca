"""A model card says what was trained, for how long, and how the model is loaded."""

from collections.abc import Sequence
from typing import Any

import yaml
from hf_checkpoints import MODELS
from small_run import manifest_facts, small_config

from megatron_step.checkpoint.manifest import Manifest
from megatron_step.huggingface.architectures import hf_config
from megatron_step.huggingface.model_card import DescribedModel, model_card

CONFIG = small_config(
    model=MODELS["llama"], stages={"count": 2, "layers": [2, 2], "start_from": "imported/llama"}, steps=8
)
METRICS = [
    {"step": step, "loss": 4.0 if step <= 6 else 3.0, "memory": {"peak_bytes": step << 20}} for step in range(1, 15)
]


def manifest(step: int, stage_index: int, kept: dict[str, Any] | None) -> Manifest:
    facts = {**manifest_facts(CONFIG, stage_index), "consumed_samples": 8 * step, "layout": {"data_parallel_size": 1}}
    return Manifest(step=step, files={}, kept_settings=kept or {}, **facts)


def card(
    step: int,
    stage_index: int,
    has_adapter: bool = False,
    changes: Sequence[str] = (),
    kept: dict[str, Any] | None = None,
) -> str:
    architecture = hf_config(CONFIG.model, 250, "bfloat16", None, 1)
    model = DescribedModel("mine", {**architecture, "eos_token_id": [1, 5]}, 1234567, 1, changes)
    return model_card(model, manifest(step, stage_index, kept), METRICS[:step], has_adapter)


def test_every_stage_has_a_line() -> None:
    text = card(14, 1)
    assert "1,234,567 weights (LlamaForCausalLM, bfloat16): layers 4, width 96" in text
    assert "for 14 steps, 3,584 tokens, in fp32" in text
    assert "started from the weights of `imported/llama`" in text
    assert "grew by interpolate, upper, mean; adapters had rank 4 and alpha 8." in text
    assert "| 1 | 2 | 6 | 1,536 | 4.0000 | - |" in text
    assert "| 2 | 2 + 2 new | 8 | 2,048 | 3.0000 | - |" in text
    assert "6.0 MiB |" in text
    assert "14.0 MiB |" in text


def test_a_stage_ends_where_the_checkpoint_is() -> None:
    text = card(3, 0)
    assert "| 1 | 2 | 3 | 768 | 4.0000 | - |" in text
    assert "\n| 2 |" not in text
    assert "grew by" not in text


def test_an_imported_model_was_not_trained_and_an_adapter_is_loaded_with_peft() -> None:
    assert "megatron_step imported the model and did not train it" in card(0, 0)
    assert 'PeftModel.from_pretrained(base, "mine/adapter")' in card(14, 1, has_adapter=True)
    assert "PeftModel" not in card(14, 1)


def test_what_was_kept_of_the_model_and_what_changed_since_stand_in_it() -> None:
    text = card(14, 1, changes=["num_hidden_layers 2 -> 4"], kept={"card": {"license": "mit", "base_model": "a/b"}})
    front = yaml.safe_load(text.split("---")[1])
    assert (front["license"], front["base_model"], front["library_name"]) == ("mit", "a/b", "transformers")
    assert "Changes since the import: num_hidden_layers 2 -> 4." in text
    assert "token 1 ended each document" in text
