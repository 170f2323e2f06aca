"""A model card says what was trained, for how long, and how the model is loaded."""

from hf_checkpoints import MODELS
from small_run import manifest_facts, small_config

from megatron_step.checkpoint.manifest import Manifest
from megatron_step.export.architectures import hf_config
from megatron_step.export.model_card import model_card

CONFIG = small_config(
    model=MODELS["llama"], stages={"count": 2, "layers": [2, 2], "start_from": "imported/llama"}, steps=8
)
METRICS = [
    {"step": step, "loss": 4.0 if step <= 6 else 3.0, "memory": {"peak_bytes": step << 20}} for step in range(1, 15)
]


def manifest(step: int, stage_index: int) -> Manifest:
    facts = {**manifest_facts(CONFIG, stage_index), "consumed_samples": 8 * step, "layout": {"data_parallel_size": 1}}
    return Manifest(step=step, files={}, **facts)


def card(step: int, stage_index: int, has_adapter: bool = False) -> str:
    architecture = hf_config(CONFIG.model, 250, "bfloat16", None, 1)
    return model_card("mine", manifest(step, stage_index), architecture, 1234567, METRICS[:step], has_adapter)


def test_every_stage_has_a_line() -> None:
    text = card(14, 1)
    assert "1,234,567 weights (LlamaForCausalLM, bfloat16): layers 4, width 96" in text
    assert "for 14 steps, 3,584 tokens, in fp32" in text
    assert "began with the weights of `imported/llama`" in text
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
    assert "imported by megatron_step, and not trained since" in card(0, 0)
    assert 'PeftModel.from_pretrained(base, "mine/adapter")' in card(14, 1, has_adapter=True)
    assert "PeftModel" not in card(14, 1)
