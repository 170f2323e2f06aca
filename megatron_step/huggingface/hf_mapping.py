"""Which Hugging Face tensors each weight of a checkpoint is made of: one table, read both ways.

checkpoint                                           Hugging Face
embedding.word_embeddings.weight                     model.embed_tokens.weight, without the padding rows
decoder.layers.N.self_attention
    .linear_qkv.layer_norm_weight                    model.layers.N.input_layernorm.weight
    .linear_qkv.weight, .bias                        .self_attn.q_proj, k_proj, v_proj: of each group in turn its
                                                     query heads, its key head, its value head
    .q_layernorm.weight, .k_layernorm.weight         .self_attn.q_norm.weight, k_norm.weight
    .linear_proj.weight                              .self_attn.o_proj.weight
decoder.layers.N.mlp
    .linear_fc1.layer_norm_weight                    .post_attention_layernorm.weight
    .linear_fc1.weight                               .mlp.gate_proj.weight above up_proj.weight
    .linear_fc2.weight                               .mlp.down_proj.weight
decoder.final_layernorm.weight                       model.norm.weight
output_layer.weight, if not tied                     lm_head.weight, without the padding rows
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_step.config.model import ModelConfig
from megatron_step.plan.blocks.layer import layer_linears
from megatron_step.plan.names import layer_key


@dataclass(frozen=True)
class MappedWeight:
    """A weight of a checkpoint, whose rows are those of one or more Hugging Face tensors, interleaved in blocks."""

    key: str
    """Its name in checkpoints."""
    shape: tuple[int, ...]
    """Its lengths in checkpoints."""
    names: tuple[str, ...]
    """The tensors that it is made of."""
    widths: tuple[int, ...] = (1,)
    """Units of rows that each of them has in a block."""
    blocks: int = 1
    """How often a block with some rows of each repeats."""
    padding: int = 0
    """Rows at its end that belong to no token."""

    @property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Lengths of the tensors that it is made of, by name."""
        rows = self.shape[0] - self.padding
        return {
            name: (rows * width // sum(self.widths), *self.shape[1:]) for name, width in zip(self.names, self.widths)
        }

    def split(self, whole: Tensor) -> dict[str, Tensor]:
        """The tensors that a whole weight [rows, ...] is made of, by name; also of another matrix with its rows."""
        rows = whole[: whole.shape[0] - self.padding]
        blocks = rows.reshape(self.blocks, sum(self.widths), -1, *rows.shape[1:])
        parts = blocks.split(self.widths, dim=1)
        return {name: part.flatten(0, 2).contiguous() for name, part in zip(self.names, parts)}

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The whole weight [rows, ...] of the named tensors; its padding rows are zero."""
        parts = [
            tensors[name].reshape(self.blocks, width, -1, *self.shape[1:])
            for name, width in zip(self.names, self.widths)
        ]
        rows = torch.cat(parts, dim=1).flatten(0, 2)
        return torch.cat((rows, rows.new_zeros(self.padding, *self.shape[1:]))) if self.padding else rows


def hf_mapping(model: ModelConfig, vocab_size: int) -> list[MappedWeight]:
    """Every weight of a model with a gated MLP, without adapters, from the embedding up to the output layer."""
    rows = model.padded_vocab_size(vocab_size)

    def of_vocabulary(key: str, name: str) -> MappedWeight:
        return MappedWeight(key, (rows, model.hidden_size), (name,), padding=rows - vocab_size)

    head = [MappedWeight("decoder.final_layernorm.weight", (model.hidden_size,), ("model.norm.weight",))]
    if not model.tie_embeddings:
        head.append(of_vocabulary("output_layer.weight", "lm_head.weight"))
    return [
        of_vocabulary("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        *(weight for layer in range(model.num_layers) for weight in _layer_weights(model, layer)),
        *head,
    ]


def _layer_weights(model: ModelConfig, layer: int) -> Iterator[MappedWeight]:
    linears = {target: (linear.outputs, linear.inputs) for target, linear in layer_linears(model).items()}
    hidden, heads = (model.hidden_size,), model.num_attention_heads // model.query_groups

    def entry(
        key: str, shape: tuple[int, ...], names: Sequence[str], widths: tuple[int, ...] = (1,), blocks: int = 1
    ) -> MappedWeight:
        named = tuple(f"model.layers.{layer}.{name}" for name in names)
        return MappedWeight(layer_key(layer, key), shape, named, widths, blocks)

    yield entry("self_attention.linear_qkv.layer_norm_weight", hidden, ["input_layernorm.weight"])
    for kind, shape in (("weight", linears["qkv"]), ("bias", linears["qkv"][:1])):
        if kind == "weight" or model.qkv_bias:
            names = [f"self_attn.{part}_proj.{kind}" for part in "qkv"]
            yield entry(f"self_attention.linear_qkv.{kind}", shape, names, (heads, 1, 1), model.query_groups)
    if model.qk_norm:
        for part in "qk":
            shape = (model.attention_head_size,)
            yield entry(f"self_attention.{part}_layernorm.weight", shape, [f"self_attn.{part}_norm.weight"])
    yield entry("self_attention.linear_proj.weight", linears["proj"], ["self_attn.o_proj.weight"])
    yield entry("mlp.linear_fc1.layer_norm_weight", hidden, ["post_attention_layernorm.weight"])
    yield entry("mlp.linear_fc1.weight", linears["fc1"], ["mlp.gate_proj.weight", "mlp.up_proj.weight"], (1, 1))
    yield entry("mlp.linear_fc2.weight", linears["fc2"], ["mlp.down_proj.weight"])
