"""The model card (README.md) of an exported model: its shape, its training, and code that loads it."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import yaml

from megatron_step.checkpoint.manifest import Manifest, saved_config
from megatron_step.config.counts import counted
from megatron_step.config.run import RunConfig, consumed_samples
from megatron_step.plan.old_layers import adapts
from megatron_step.plan.operators import describe_growth
from megatron_step.plan.resolved import resolve
from megatron_step.plan.stages import Stage, plan_from_dict
from megatron_step.planner.costs.memory import stage_memory
from megatron_step.report.text_table import format_bytes

Metrics = Sequence[dict[str, Any]]
"""Lines of a run's metrics.jsonl, one per step."""


@dataclass(frozen=True)
class DescribedModel:
    """The facts about a model that its card states."""

    name: str
    """Name of the model's folder."""
    architecture: dict[str, Any]
    """The model's config.json."""
    num_weights: int
    """Number of weights."""
    eod_id: int
    """Id of the token that ended documents in training."""
    changes: Sequence[str] = ()
    """Descriptions of settings that training changed since the import of a Hugging Face model."""


_PRECISIONS = {"bf16": "bf16", "bf16_weights": "bf16 weights and fp32 arithmetic", "fp32": "fp32"}
_LAST_STEPS = 10  # steps over which the training loss is averaged, since one step's loss depends on its batch

_LOADED = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
"""
_LOADED_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{folder}/base", dtype="auto")
model = PeftModel.from_pretrained(base, "{folder}/adapter")
tokenizer = AutoTokenizer.from_pretrained("{folder}/base")
"""


def model_card(model: DescribedModel, manifest: Manifest, metrics: Metrics, has_adapter: bool) -> str:
    """Return the model card as text; `metrics` are the lines of the run's metrics.jsonl, or empty."""
    name, architecture = model.name, model.architecture
    front = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["megatron_step"]}
    code = (_LOADED_ADAPTER if has_adapter else _LOADED).format(folder=name)
    sizes = ", ".join(
        f"{label} {architecture[key]:,}"
        for label, key in (
            ("layers", "num_hidden_layers"),
            ("width", "hidden_size"),
            ("MLP width", "intermediate_size"),
            ("heads", "num_attention_heads"),
            ("key and value heads", "num_key_value_heads"),
            ("vocabulary", "vocab_size"),
            ("context", "max_position_embeddings"),
        )
    )
    return "\n".join(
        [
            "---",
            yaml.safe_dump({**front, **manifest.kept_settings.get("card", {})}, sort_keys=False).rstrip(),
            "---",
            "",
            f"# {name}",
            "",
            f"A language model of {model.num_weights:,} weights ({architecture['architectures'][0]}, "
            f"{architecture['torch_dtype']}): {sizes}.",
            "",
            "```python",
            f"{code}```",
            "",
            f"In training, token {model.eod_id} ended each document, and no token began one. The tokenizer adds none.",
            "",
            "## How it was trained",
            "",
            *_training(manifest, metrics),
            *(["", "Changes since the import: " + "; ".join(model.changes) + "."] if model.changes else []),
            "",
        ]
    )


def _training(manifest: Manifest, metrics: Metrics) -> list[str]:
    if manifest.step == 0:
        return ["megatron_step imported the model and did not train it."]
    config = saved_config(manifest)
    stages = [stage for stage in plan_from_dict(manifest.plan).stages if stage.index <= manifest.stage_index]
    rows = [_stage_row(stage, config, manifest, metrics) for stage in stages if stage.num_steps > 0]
    source = config.stages.start_from
    began = f" Training started from the weights of `{source}`." if source else ""
    grown = ""
    if manifest.stage_index > 0:
        adapter = config.adapter
        grown = f" The model grew by {describe_growth(config.growth)}"
        grown += f"; adapters had rank {adapter.rank} and alpha {adapter.alpha:g}." if adapts(config) else "."
    return [
        f"Pre-trained with megatron_step for {counted(manifest.step, 'step')}, "
        f"{counted(manifest.consumed_samples * config.model.seq_length, 'token')}, in "
        f"{_PRECISIONS[config.training.precision]}."
        f"{began}{grown}",
        "",
        "| stage | layers | steps | tokens | training loss | validation loss | planned peak memory | measured |",
        "|---|---|---|---|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        "Losses are from the end of each stage, in nats per token. Memory is that of the rank that needs the most.",
    ]


def _stage_row(stage: Stage, config: RunConfig, manifest: Manifest, metrics: Metrics) -> list[str]:
    last_step = min(stage.last_step, manifest.step)
    samples = consumed_samples(config.training, last_step) - consumed_samples(config.training, stage.first_step)
    lines = [line for line in metrics if stage.first_step < line["step"] <= last_step]
    validated = [line["validation_loss"] for line in lines if "validation_loss" in line]
    peaks = [line["memory"]["peak_bytes"] for line in lines if "memory" in line]
    dp_size = manifest.layout["data_parallel_size"]
    planned = max(memory.peak_bytes for memory in stage_memory(resolve(config, manifest.vocab_size, dp_size), stage))
    old = stage.num_layers - stage.num_new_layers
    return [
        str(stage.number),
        f"{old} + {stage.num_new_layers} new" if old else str(stage.num_layers),
        f"{last_step - stage.first_step:,}",
        f"{samples * config.model.seq_length:,}",
        f"{mean(line['loss'] for line in lines[-_LAST_STEPS:]):.4f}" if lines else "-",
        f"{validated[-1]:.4f}" if validated else "-",
        format_bytes(planned),
        format_bytes(max(peaks)) if peaks else "-",
    ]
