"""Three ways to train a model on a batch: megatron_step, megatron-core's stock layers, and transformers.

An arm is a function that takes one whole step (zero the gradients, forward, backward, clip, AdamW) and returns the
loss before the update.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from benchmarks.timing import use_all_cores
from megatron_step.config.model import ModelConfig
from megatron_step.config.run import RunConfig
from megatron_step.engine.formats import tensor_type
from megatron_step.engine.parallel import Parallel, parallel_layout, stop_world
from megatron_step.plan.states import weight_format
from megatron_step.training.state import TrainState
from megatron_step.training.step import train_step

Arm = Callable[[], float]
Batch = dict[str, Tensor]
"""`tokens` and `labels`, [b, s] int64."""
Weights = dict[str, Tensor]
"""A model's weights by megatron-core's names."""


@contextmanager
def one_rank(config: RunConfig) -> Iterator[Parallel]:
    """Make the process groups of this process alone, with all cores for torch."""
    use_all_cores()
    try:
        with parallel_layout(config.parallel, config.training.seed) as parallel:
            yield parallel
    finally:
        stop_world()


def random_batch(model: ModelConfig, micro_batch_size: int, seed: int = 1) -> Batch:
    """Return random tokens [b, s] and, as labels, the tokens that follow them."""
    assert model.vocab_size is not None
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(model.vocab_size, (micro_batch_size, model.seq_length + 1), generator=generator)
    return {"tokens": text[:, :-1].contiguous(), "labels": text[:, 1:].contiguous()}


def weights_of(state: TrainState) -> Weights:
    """Return copies of a state's weights."""
    weights = state.chunks[0].state_dict()
    return {name: weight.clone() for name, weight in weights.items() if isinstance(weight, Tensor)}


def megatron_step_arm(state: TrainState, batch: Batch, config: RunConfig, parallel: Parallel) -> Arm:
    """Return an arm with megatron_step's training step."""
    rate = config.optimizer.learning_rate

    def step() -> float:
        return train_step(state, [batch], rate, config, parallel, False).loss

    return step


def megatron_core_arm(weights: Weights, batch: Batch, config: RunConfig) -> Arm:
    """Return an arm with megatron-core's stock local layers, data parallelism and optimizer.

    Without Apex and TransformerEngine the optimizer is torch's AdamW with its defaults. On the CPU the engine's import
    hook applies.
    """
    model = _stock_model(config)
    model.load_state_dict(weights, strict=False)
    model_config = model.config
    if model_config.bf16:
        model = Float16Module(model_config, model)
    chunk = DistributedDataParallel(model_config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    optimizer = _stock_optimizer(chunk, config)
    seq_length = config.model.seq_length
    mask = torch.ones(1, 1, seq_length, seq_length, dtype=torch.bool).triu(1)  # true where attention may not look
    positions = torch.arange(seq_length).expand_as(batch["tokens"])
    run_schedule = get_forward_backward_func()

    def forward_step(batches: Any, chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        one = next(batches)
        losses = chunk(one["tokens"], positions, mask, labels=one["labels"])  # [b, s]
        return losses, lambda losses: (losses.mean(), losses.detach().mean())

    def step() -> float:
        chunk.zero_grad_buffer()
        optimizer.zero_grad()
        losses = run_schedule(
            forward_step_func=forward_step,
            data_iterator=iter([batch]),
            model=chunk,
            num_microbatches=1,
            seq_length=seq_length,
            micro_batch_size=config.training.micro_batch_size,
            forward_only=False,
        )
        finalize_model_grads([chunk])
        optimizer.step()
        return losses[0].item()

    return step


def _stock_model(config: RunConfig) -> GPTModel:
    """Build megatron-core's GPTModel with its local spec and default settings, in the shape of `config`."""
    model = config.model
    dtype = tensor_type(weight_format(config.training.precision))
    return GPTModel(
        config=TransformerConfig(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            ffn_hidden_size=model.ffn_hidden_size,
            num_attention_heads=model.num_attention_heads,
            num_query_groups=model.query_groups,
            normalization="RMSNorm",
            layernorm_epsilon=model.norm_epsilon,
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            add_bias_linear=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            bf16=dtype is torch.bfloat16,
        ),
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=model.vocab_size,
        max_sequence_length=model.seq_length,
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=int(model.rope_theta),
    )


def _stock_optimizer(chunk: DistributedDataParallel, config: RunConfig) -> Any:
    settings = config.optimizer
    precision = config.training.precision
    return get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.beta1,
            adam_beta2=settings.beta2,
            adam_eps=settings.epsilon,
            clip_grad=settings.clip_grad,
            bf16=precision == "bf16",
            params_dtype=tensor_type(weight_format(precision)),
        ),
        [chunk],
    )


def transformers_arm(weights: Weights, batch: Batch, config: RunConfig) -> Arm:
    """Return an arm with transformers' Llama, SDPA and torch's fused AdamW; in bf16, moments are bf16, too."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(
        _llama_config(config), dtype=tensor_type(weight_format(config.training.precision))
    )
    model.load_state_dict(llama_weights(weights, config.model))
    model.train()
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        fused=True,
    )

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        # The labels are already shifted to the next token.
        loss = model(
            input_ids=batch["tokens"], labels=batch["labels"], shift_labels=batch["labels"], use_cache=False
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
        optimizer.step()
        return loss.item()

    return step


def _llama_config(config: RunConfig) -> Any:
    from transformers import LlamaConfig

    model = config.model
    return LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.query_groups,
        max_position_embeddings=model.seq_length,
        rms_norm_eps=model.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        tie_word_embeddings=model.tie_embeddings,
        attn_implementation="sdpa",
    )


def llama_weights(weights: Weights, model: ModelConfig) -> dict[str, Tensor]:
    """Return megatron-core's weights by the names of transformers' Llama."""
    heads_per_group = model.num_attention_heads // model.query_groups
    llama = {
        "model.embed_tokens.weight": weights["embedding.word_embeddings.weight"],
        "model.norm.weight": weights["decoder.final_layernorm.weight"],
        "lm_head.weight": weights["output_layer.weight"],
    }
    for layer in range(model.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        qkv = weights[ours + "self_attention.linear_qkv.weight"]  # [g (n / g + 2) d, h]
        qkv = qkv.view(model.query_groups, heads_per_group + 2, model.attention_head_size, model.hidden_size)
        projections = qkv.split([heads_per_group, 1, 1], dim=1)
        for name, weight in zip(("q_proj", "k_proj", "v_proj"), projections):
            llama[f"{theirs}self_attn.{name}.weight"] = weight.reshape(-1, model.hidden_size)
        gate, up = weights[ours + "mlp.linear_fc1.weight"].chunk(2)
        llama[theirs + "mlp.gate_proj.weight"] = gate
        llama[theirs + "mlp.up_proj.weight"] = up
        llama[theirs + "mlp.down_proj.weight"] = weights[ours + "mlp.linear_fc2.weight"]
        llama[theirs + "self_attn.o_proj.weight"] = weights[ours + "self_attention.linear_proj.weight"]
        llama[theirs + "input_layernorm.weight"] = weights[ours + "input_layernorm.weight"]
        llama[theirs + "post_attention_layernorm.weight"] = weights[ours + "pre_mlp_layernorm.weight"]
    return llama
