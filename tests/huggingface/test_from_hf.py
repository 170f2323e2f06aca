"""An imported model trains on as in transformers, grows, and comes back as it was."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hf_checkpoints import LAYOUTS, Alone, word_tokenizer
from safetensors.torch import load_file, save_file
from small_run import VOCAB_SIZE, made_up_batch, small_config
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from worlds import Worlds

from megatron_step.config.data import DataConfig
from megatron_step.config.model import ModelConfig
from megatron_step.config.run import RunConfig
from megatron_step.data.tokenizer import load_tokenizer
from megatron_step.engine.parallel import parallel_layout
from megatron_step.huggingface.from_hf import import_model
from megatron_step.huggingface.to_hf import ExportOptions, export_model
from megatron_step.plan.resolved import resolve
from megatron_step.planner.plan import make_plan
from megatron_step.training.entry import first_state
from megatron_step.training.step import train_step

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.1,
    "eos_token_id": 1,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Class, config, settings beside the sizes, number format.
MODELS: dict[str, tuple[Any, Any, dict[str, Any], torch.dtype]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": _LLAMA3, "tie_word_embeddings": True}, torch.float16),
    "mistral": (MistralForCausalLM, MistralConfig, {"head_dim": 24, "sliding_window": None}, torch.bfloat16),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}, torch.bfloat16),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 24, "tie_word_embeddings": True}, torch.float32),
}


def made_model(name: str, folder: Path, **shards: Any) -> Path:
    """The folder of a Hugging Face model with random weights, biases and norms, and a tokenizer."""
    model_class, config_class, more, dtype = MODELS[name]
    torch.manual_seed(3)
    model = model_class(config_class(**{**_SIZES, **more}))
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    model.to(dtype).save_pretrained(folder, **shards)
    word_tokenizer(folder)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_what_is_imported_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    sharding = {"max_shard_size": "100KB"} if name == "qwen2" else {}
    source = made_model(name, tmp_path / "source", **sharding)
    assert len(list(source.glob("*.safetensors"))) == (3 if sharding else 1)
    imported = import_model(source, tmp_path / "imported")
    dtype = str(MODELS[name][3]).removeprefix("torch.")
    assert imported.dtypes == [dtype]
    assert imported.precision == ("bf16" if dtype == "bfloat16" else "fp32")
    comparison = export_model(tmp_path / "imported", tmp_path / "back", ExportOptions(dtype=dtype, check=True))
    before = {name: tensor for file in source.glob("*.safetensors") for name, tensor in load_file(file).items()}
    after = load_file(tmp_path / "back/model.safetensors")
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype
        assert torch.equal(tensor, after[key]), key
    # The check loads the export; that the logits are the source's, too, shows its config.json to be right.
    assert comparison is not None
    assert comparison.max_difference <= 1e-5 * comparison.largest_logit
    tokens = torch.arange(24)[None] * 7 % VOCAB_SIZE
    logits = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
        for folder in (source, tmp_path / "back")
    ]
    assert torch.equal(*logits)
    assert "did not train it" in (tmp_path / "back/README.md").read_text()


def continued(model: ModelConfig, start: Path, layout: str, stages: dict[str, Any], **sections: Any) -> RunConfig:
    """A run that starts from an imported model."""
    return small_config(
        model=vars(model),
        data=DataConfig([(1.0, "unused")], str(start / "tokenizer"), [(1.0, "unused")]),
        stages={**stages, "start_from": str(start)},
        parallel=LAYOUTS[layout][1],
        **sections,
    )


def test_five_steps_are_those_of_transformers(worlds: Worlds, tmp_path: Path) -> None:
    source = made_model("qwen3", tmp_path / "source")
    imported = import_model(source, tmp_path / "imported")
    config = continued(imported.model, tmp_path / "imported", "TP2 PP2", stages={"layers": [2]})
    ours = worlds(4).run(train_from, config=config)[0]

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    decayed = [weight for weight in model.parameters() if weight.dim() > 1]
    others = [weight for weight in model.parameters() if weight.dim() == 1]
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=3e-3,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
    )
    losses = []
    for step in range(5):
        parts = made_up_batch(config, step, Alone())
        tokens, labels = (torch.cat([part[name] for part in parts]) for name in ("tokens", "labels"))
        loss = torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
        optimizer.step()
        losses.append(loss.item())
    assert ours == pytest.approx(losses, rel=1e-4)
    assert max(losses) - min(losses) > 0.01


def test_an_imported_model_grows(worlds: Worlds, tmp_path: Path) -> None:
    imported = import_model(made_model("qwen2", tmp_path / "source"), tmp_path / "imported")
    model = replace(imported.model, num_layers=3)
    stages = {"count": 2, "layers": [2, 1], "steps": [0, 5]}
    growth = {"init": "identity"}
    config = continued(model, tmp_path / "imported", "TP2", stages=stages, growth=growth)
    grown = worlds(2).run(train_from, config=config)[0]
    plain = continued(imported.model, tmp_path / "imported", "TP2", stages={"layers": [2]})
    assert grown[0] == pytest.approx(worlds(2).run(train_from, config=plain)[0][0], rel=1e-5)


def test_the_printed_sections_are_a_config(tmp_path: Path) -> None:
    imported = import_model(made_model("llama", tmp_path / "source"), tmp_path / "imported", seq_length=16)
    sections = yaml.safe_load(imported.config_sections(tmp_path / "imported"))
    assert sections["model"]["rope_scaling"]["factor"] == 8.0
    assert sections["model"]["vocab_size"] == VOCAB_SIZE
    assert sections["model"]["seq_length"] == 16
    assert load_tokenizer(sections["data"]["tokenizer"]).encode("it was") == [2, 3]
    assert sections["stages"]["start_from"] == str(tmp_path / "imported")


def test_values_beyond_a_number_format_are_refused(sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound, tmp_path / "source")
    other_tensors(lambda tensors: tensors.update({_NORM: torch.full((96,), 1e6)}))(tmp_path / "source")
    import_model(tmp_path / "source", tmp_path / "imported")
    with pytest.raises(ValueError, match="final_layernorm.weight has values too large for float16"):
        export_model(tmp_path / "imported", tmp_path / "back", ExportOptions(dtype="float16"))
    assert not (tmp_path / "back").exists()


def edited(**values: Any) -> Callable[[Path], None]:
    """Other values in config.json."""

    def edit(folder: Path) -> None:
        written = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**written, **values}))

    return edit


def other_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    """Other tensors in model.safetensors."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


_NORM = "model.norm.weight"
BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "another architecture": (
        edited(architectures=["GPT2LMHeadModel"], model_type="gpt2"),
        "architecture GPT2LMHeadModel, which is not supported: import one of LlamaForCausalLM, MistralForCausalLM",
    ),
    "a missing file": (lambda folder: (folder / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "a truncated file": (truncate, "model.safetensors is truncated or damaged"),
    "a missing tensor": (other_tensors(lambda tensors: tensors.pop(_NORM)), f"lacks the tensor {_NORM}"),
    "another shape": (
        other_tensors(lambda tensors: tensors.update({_NORM: torch.ones(5)})),
        f"{_NORM} in shape \\[5\\], but its config.json needs \\[96\\]",
    ),
    "an unknown tensor": (other_tensors(lambda tensors: tensors.update(more=torch.ones(5))), "not describe: more"),
    "integers": (
        other_tensors(lambda tensors: tensors.update({_NORM: torch.ones(96, dtype=torch.int8)})),
        "norm.weight in I8",
    ),
    "not finite": (
        other_tensors(lambda tensors: tensors.update({_NORM: torch.full((96,), torch.inf)})),
        "infinite or NaN values in .*norm.weight",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "it has no config.json"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
    "a small vocabulary": (
        lambda folder: (folder / "tokenizer.json").write_text(
            (folder / "tokenizer.json")
            .read_text()
            .replace('"fine": 5', '"fine": 999')
            .replace('"fine":5', '"fine":999')
        ),
        "has 1,000 tokens, but the model's vocabulary has 250",
    ),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_model("qwen3", tmp_path_factory.mktemp("sound") / "source")


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_said_and_nothing_is_left(sound: Path, tmp_path: Path, case: str) -> None:
    spoil, message = BAD[case]
    source = tmp_path / "source"
    shutil.copytree(sound, source)
    spoil(source)
    with pytest.raises((ValueError, OSError), match=message) as raised:
        import_model(source, tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == [source]


# What the ranks run.


def train_from(config: RunConfig) -> list[float]:
    """Losses of five steps from the checkpoint that the run starts from."""
    with parallel_layout(config.parallel, 1) as parallel:
        tokenizer = load_tokenizer(config.data.tokenizer)
        plan = make_plan(resolve(config, VOCAB_SIZE))
        state = first_state(config, plan, None, tokenizer, VOCAB_SIZE, parallel)
        return [
            train_step(state, made_up_batch(config, step, parallel), 3e-3, config, parallel, False).loss
            for step in range(5)
        ]
