"""Small checkpoints of every architecture that Hugging Face has, and their peers there."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from small_run import VOCAB_SIZE, made_up_batch, manifest_facts, small_config, spread
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from megatron_step.checkpoint.load import find_checkpoint
from megatron_step.checkpoint.save import CheckpointSaver
from megatron_step.config.data import DataConfig
from megatron_step.config.model import RopeScalingConfig
from megatron_step.config.run import RunConfig
from megatron_step.data.tokenizer import load_tokenizer
from megatron_step.engine.parallel import Parallel, parallel_layout
from megatron_step.plan.resolved import resolve
from megatron_step.plan.states import training_recipe
from megatron_step.planner.plan import make_plan
from megatron_step.training.entry import first_state
from megatron_step.training.state import TrainState, build_stage_model, make_trainable
from megatron_step.training.step import evaluate_batch, train_step

_ODD_GROUPS = {"num_attention_heads": 6, "num_query_groups": 2, "hidden_size": 96}
_LLAMA3 = RopeScalingConfig(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=16)

# Weights are large, so that a wrong head or rotation shows in the logits.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**_ODD_GROUPS, "init_std": 0.15},
    "llama 3, tied": {
        "num_query_groups": 2,
        "tie_embeddings": True,
        "rope_theta": 5e5,
        "rope_scaling": _LLAMA3,
        "init_std": 0.15,
    },
    "qwen2": {**_ODD_GROUPS, "qkv_bias": True, "norm_epsilon": 1e-6, "init_std": 0.15},
    "qwen3, tied": {
        "num_query_groups": 2,
        "qk_norm": True,
        "head_size": 24,
        "tie_embeddings": True,
        "rope_theta": 1e6,
        "init_std": 0.15,
    },
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "TP2": (2, {"tensor_parallel_size": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline_parallel_size": 2}),
    "TP2 PP2": (4, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}),
}


def word_tokenizer(folder: Path) -> Path:
    """The folder of a tokenizer of a few words, which fits the small models."""
    folder.mkdir(parents=True, exist_ok=True)
    words = {word: index for index, word in enumerate(["<unk>", "</s>", "it", "was", "a", "fine", "morning"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    text = '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>"}'
    (folder / "tokenizer_config.json").write_text(text)
    return folder


def grown_config(model: str, layout: str, tokenizer: Path, **sections: Any) -> RunConfig:
    """Three stages, of two, three and four layers."""
    data = DataConfig(train=[(1.0, "unused")], tokenizer=str(tokenizer), validation=[(1.0, "unused")])
    return small_config(
        model=MODELS[model],
        data=data,
        steps=4,
        stages={"count": 3, "layers": [2, 1, 1]},
        parallel=LAYOUTS[layout][1],
        **sections,
    )


def saved_facts(config: RunConfig, stage_index: int) -> dict[str, Any]:
    """Manifest of a checkpoint that was saved in a stage."""
    fingerprint = {"tokenizer": load_tokenizer(config.data.tokenizer).fingerprint}
    layout = {"data_parallel_size": 1}
    return {**manifest_facts(config, stage_index), "data_fingerprint": fingerprint, "layout": layout}


def hf_loss(folder: Path, config: RunConfig) -> float:
    """transformers' loss on the batch that `save_stages` evaluates."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    batch = made_up_batch(config, 7, Alone())
    tokens, labels = (torch.cat([part[name] for part in batch]) for name in ("tokens", "labels"))
    with torch.no_grad():
        return float(torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten()))


class Alone:
    """The place of a process without others."""

    dp_rank, dp_size = 0, 1


# What the ranks run.


def save_stages(configs: Sequence[RunConfig], folders: Sequence[Path], merges: bool) -> list[list[float]]:
    """Train a little in the middle stage, whose adapters live, and save; where asked for, grow, which merges them, and
    save that. Returns the loss of each on a batch, for each config; all have one layout."""
    with parallel_layout(configs[0].parallel, 1) as parallel:
        return [list(_save_stages(config, folder, merges, parallel)) for config, folder in zip(configs, folders)]


def _save_stages(config: RunConfig, folder: Path, merges: bool, parallel: Parallel) -> Any:
    plan = make_plan(resolve(config, VOCAB_SIZE))
    stage = plan.stages[1]
    chunks = build_stage_model(config, stage, stage.first_step, VOCAB_SIZE, parallel)
    spread(chunks, parallel)
    state = make_trainable(chunks, config, plan, stage, stage.first_step, parallel)
    for step in range(stage.first_step, stage.last_step):
        train_step(state, made_up_batch(config, step, parallel), 2e-3, config, parallel, False)
    yield _save(state, config, folder / "live", stage.last_step - (not merges), parallel)
    if merges:
        found = find_checkpoint(folder / "live", "auto", parallel)
        grown = first_state(config, plan, found, None, VOCAB_SIZE, parallel)
        yield _save(grown, config, folder / "merged", grown.step, parallel)


def _save(state: TrainState, config: RunConfig, folder: Path, step: int, parallel: Parallel) -> float:
    saver = CheckpointSaver(folder, replace(config.checkpoint, keep=0), parallel)
    facts = saved_facts(config, state.stage.index)
    saver.save(state.chunks, state.optimizer, training_recipe(config), step, facts)
    return evaluate_batch(state.chunks, made_up_batch(config, 7, parallel), config, parallel)
