"""The Hugging Face tensors of each weight of a checkpoint, in one table for import and export.

checkpoint                                           Hugging Face
embedding.word_embeddings.weight                     model.embed_tokens.weight, without the padding rows
decoder.layers.N.self_attention
    .linear_qkv.layer_norm_weight                    model.layers.N.input_layernorm.weight
    .linear_qkv.weight, .bias                        .self_attn.q_proj, k_proj, v_proj: for each group its query heads,
                                                     its key head and its value head
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
from megatron_step.plan.names import (
    ATTENTION_NORM,
    EMBEDDING,
    FC1,
    FC2,
    FINAL_NORM,
    KEY_NORM,
    MLP_NORM,
    OUTPUT_LAYER,
    PROJ,
    QKV,
    QUERY_NORM,
    layer_key,
)
from megatron_step.plan.resolved import layer_blocks

HF_EMBEDDING, HF_OUTPUT_LAYER = "model.embed_tokens.weight", "lm_head.weight"
"""Hugging Face's names of the embedding and of an output layer that is not tied to it."""


@dataclass(frozen=True)
class MappedWeight:
    """A weight of a checkpoint that interleaves the rows of one or more Hugging Face tensors in blocks."""

    key: str
    """The weight's name in checkpoints."""
    shape: tuple[int, ...]
    """The weight's shape in checkpoints."""
    names: tuple[str, ...]
    """Names of the Hugging Face tensors."""
    widths: tuple[int, ...] = (1,)
    """Relative numbers of rows that the tensors have in a block."""
    blocks: int = 1
    """Number of blocks; each block holds rows of every tensor."""
    padding: int = 0
    """Rows at the end of the weight that belong to no token."""

    @property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the Hugging Face tensors by name."""
        rows = self.shape[0] - self.padding
        return {
            name: (rows * width // sum(self.widths), *self.shape[1:]) for name, width in zip(self.names, self.widths)
        }

    def split(self, whole: Tensor) -> dict[str, Tensor]:
        """Split a whole weight [rows, ...], or another matrix with its rows, into tensors by name."""
        rows = whole[: whole.shape[0] - self.padding]
        blocks = rows.reshape(self.blocks, sum(self.widths), -1, *rows.shape[1:])
        pieces = blocks.split(self.widths, dim=1)
        return {name: piece.flatten(0, 2).contiguous() for name, piece in zip(self.names, pieces)}

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Join the named tensors into the whole weight [rows, ...]; padding rows are zero."""
        pieces = [
            tensors[name].reshape(self.blocks, width, -1, *self.shape[1:])
            for name, width in zip(self.names, self.widths)
        ]
        rows = torch.cat(pieces, dim=1).flatten(0, 2)
        return torch.cat((rows, rows.new_zeros(self.padding, *self.shape[1:]))) if self.padding else rows


def hf_mapping(model: ModelConfig, vocab_size: int) -> list[MappedWeight]:
    """Return every weight of a model with a gated MLP, without adapters, from the embedding to the output layer."""
    rows = model.padded_vocab_size(vocab_size)

    def vocabulary_weight(key: str, name: str) -> MappedWeight:
        return MappedWeight(key, (rows, model.hidden_size), (name,), padding=rows - vocab_size)

    head = [MappedWeight(FINAL_NORM, (model.hidden_size,), ("model.norm.weight",))]
    if not model.tie_embeddings:
        head.append(vocabulary_weight(OUTPUT_LAYER, HF_OUTPUT_LAYER))
    return [
        vocabulary_weight(EMBEDDING, HF_EMBEDDING),
        *(weight for layer in range(model.num_layers) for weight in _layer_weights(model, layer)),
        *head,
    ]


def _layer_weights(model: ModelConfig, layer: int) -> Iterator[MappedWeight]:
    linears = {target: (linear.outputs, linear.inputs) for target, linear in layer_blocks(model).linears().items()}
    hidden, heads = (model.hidden_size,), model.num_attention_heads // model.query_groups

    def entry(
        key: str, shape: tuple[int, ...], names: Sequence[str], widths: tuple[int, ...] = (1,), blocks: int = 1
    ) -> MappedWeight:
        named = tuple(f"model.layers.{layer}.{name}" for name in names)
        return MappedWeight(layer_key(layer, key), shape, named, widths, blocks)

    yield entry(ATTENTION_NORM, hidden, ["input_layernorm.weight"])
    for kind, shape in (("weight", linears["qkv"]), ("bias", linears["qkv"][:1])):
        if kind == "weight" or model.qkv_bias:
            names = [f"self_attn.{letter}_proj.{kind}" for letter in "qkv"]
            yield entry(f"{QKV}.{kind}", shape, names, (heads, 1, 1), model.query_groups)
    if model.qk_norm:
        for key, letter in ((QUERY_NORM, "q"), (KEY_NORM, "k")):
            yield entry(key, (model.attention_head_size,), [f"self_attn.{letter}_norm.weight"])
    yield entry(f"{PROJ}.weight", linears["proj"], ["self_attn.o_proj.weight"])
    yield entry(MLP_NORM, hidden, ["post_attention_layernorm.weight"])
    yield entry(f"{FC1}.weight", linears["fc1"], ["mlp.gate_proj.weight", "mlp.up_proj.weight"], (1, 1))
    yield entry(f"{FC2}.weight", linears["fc2"], ["mlp.down_proj.weight"])
