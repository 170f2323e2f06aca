"""The rule that trains a weight, and the logical matrices of a weight that Muon trains.

Muon trains the matrices of layers: qkv, proj, fc1, fc2. AdamW trains the embedding, the output layer, norms, biases and
adapters. Muon orthogonalises each logical matrix apart. A fused weight holds several of them, in rows:

    qkv     of each query group: the rows of its n / g heads of queries, of its key, of its value, each d rows
    fc1     of a gated MLP: gate, then up
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from megatron_step.config.model import ModelConfig
from megatron_step.config.optimization import Rule
from megatron_step.plan.names import FC1, QKV, is_adapter, layer_of

ELEMENTS_AT_ONCE = 2**18
"""Most elements whose momentum or weights Muon has decoded at a time; always at least a row of the weight."""


def rule_of(key: str, shape: Sequence[int], rule: Rule) -> Rule:
    """Return the rule that trains the weight `key` of lengths `shape` where `optimizer.rule` is `rule`.

    Raises ValueError if Muon cannot train the weight.
    """
    if rule == "adamw" or layer_of(key) < 0 or len(shape) < 2 or is_adapter(key):
        return "adamw"
    if len(shape) > 2 or not prod(shape):
        raise ValueError(
            f"optimizer.rule muon trains matrices, but {key} has the shape {list(shape)}: set optimizer.rule to adamw"
        )
    return "muon"


@dataclass(frozen=True, order=True)
class Matrix:
    """A logical matrix: the rows [first, last) of every `period` rows of a whole weight."""

    key: str
    """The weight's name in checkpoints."""
    period: int
    """Rows of the weight after which its pattern of matrices repeats."""
    first: int
    """First row of the matrix in a period."""
    last: int
    """The row after its last one in a period."""
    rows: int
    """Rows of the matrix, over all periods."""
    columns: int
    """Columns of the matrix, which are those of the weight."""

    @property
    def numel(self) -> int:
        """Elements of the matrix."""
        return self.rows * self.columns

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield its runs of rows among the rows [start, stop) of the weight: first row, row after the last, and the
        first row's place in the matrix."""
        height = self.last - self.first
        for period in range(start // self.period, -(-stop // self.period)):
            begin = period * self.period
            first, last = max(start, begin + self.first), min(stop, begin + self.last)
            if first < last:
                yield first, last, period * height + first - begin - self.first


def logical_matrices(key: str, rows: int, columns: int, model: ModelConfig) -> list[Matrix]:
    """Return the logical matrices of a whole weight of a layer, [rows, columns], in the order of their rows."""
    heights = [rows]
    if key.endswith(f"{QKV}.weight"):
        head = model.attention_head_size
        heights = [model.num_attention_heads // model.query_groups * head, head, head]
    elif key.endswith(f"{FC1}.weight") and model.gated_mlp:
        heights = [rows // 2, rows // 2]
    period, first, matrices = sum(heights), 0, []
    for height in heights:
        matrices.append(Matrix(key, period, first, first + height, rows // period * height, columns))
        first += height
    return matrices
