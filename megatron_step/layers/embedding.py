"""The token embedding of a model whose activations are wider than its weights; megatron-core's has one type."""

import torch
from megatron.core import tensor_parallel
from torch import Tensor

from megatron_step import ops


class WideningEmbedding(tensor_parallel.VocabParallelEmbedding):
    """megatron-core's embedding, split by rows over ranks, with output and gradient in `output_type`."""

    output_type: torch.dtype

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up tokens [b, s] -> [b, s, h], or [s / t, b, h] under sequence parallelism."""
        if self.tp_group.size() == 1:
            return ops.embedding(tokens, self.weight, self.output_type)
        elsewhere = (tokens < self.vocab_start_index) | (tokens >= self.vocab_end_index)
        index = (tokens - self.vocab_start_index).masked_fill_(elsewhere, 0)
        rows = ops.embedding(index, self.weight, self.output_type).masked_fill(elsewhere.unsqueeze(-1), 0.0)
        if self.reduce_scatter_embeddings:
            rows = rows.transpose(0, 1).contiguous()
            return tensor_parallel.reduce_scatter_to_sequence_parallel_region(rows, group=self.tp_group)
        return tensor_parallel.reduce_from_tensor_model_parallel_region(rows, group=self.tp_group)


def widen_embedding(embedding: tensor_parallel.VocabParallelEmbedding, output_type: torch.dtype) -> None:
    """Make megatron-core's embedding a WideningEmbedding, in place."""
    # The class changes, because megatron-core's model builds the module itself.
    embedding.__class__ = WideningEmbedding
    embedding.output_type = output_type
