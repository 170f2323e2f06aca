"""The program of the STEP paper (Yano et al., 2025): model states on one device, counted as the paper counts them.

    P_i = 16 n_i P + 2 N_(i-1) P + 16 N_(i-1) E + c      bytes,   N_i = n_1 + ... + n_i

    minimise over integers n_1, ..., n_K >= 1   max_i P_i     subject to   n_1 + ... + n_K = L

A layer has P parameters and its adapters have E. The embedding, the output layer and the final norm take c bytes, which
the paper leaves out.
"""

from dataclasses import dataclass, replace

import numpy as np

from megatron_step.config.counts import counted
from megatron_step.config.parallel import ParallelConfig
from megatron_step.plan.layout import rank_chunks
from megatron_step.plan.resolved import ResolvedConfig
from megatron_step.plan.states import RECIPES
from megatron_step.planner.costs.held import held_ends, held_layer
from megatron_step.planner.costs.stage_costs import stage_of
from megatron_step.planner.search.depths import best_depths
from megatron_step.planner.search.program import solve_program


@dataclass(frozen=True)
class PaperPlan:
    """The plan that the paper's program gives for a model."""

    layers: tuple[int, ...]
    """New layers of each stage: n_1, ..., n_K."""
    stage_bytes: tuple[int, ...]
    """Bytes of each stage: P_1, ..., P_K."""
    vanilla_bytes: int
    """Bytes of ordinary training: 16 L P + c."""

    @property
    def reduction(self) -> float:
        """Share of the bytes of ordinary training that the largest stage saves."""
        return 1 - max(self.stage_bytes) / self.vanilla_bytes


def paper_plan(resolved: ResolvedConfig, count: int, *, with_embeddings: bool) -> PaperPlan:
    """Choose the layers of `count` stages with the paper's program, and count the bytes by its formula.

    Raises ValueError if there are fewer layers than stages, and SolverError if the program's solver cannot be loaded.
    """
    depth = resolved.config.model.num_layers
    if count > depth:
        raise ValueError(
            f"{counted(count, 'stage')} cannot share {counted(depth, 'layer')}, because each stage adds at least one "
            f"layer: plan at most {counted(depth, 'stage')}"
        )
    resolved = resolved.with_config(replace(resolved.config, parallel=ParallelConfig()))  # one device
    first, later = stage_of((0,), index=0), stage_of((0, 1), index=1)
    recipe = RECIPES["paper"]
    (whole,) = rank_chunks(resolved.config.parallel, 0)
    old, new = (recipe.state_bytes(held_layer(resolved, later, layer).parameters) for layer in (0, 1))
    outer = [recipe.state_bytes(held_ends(resolved, stage, whole).parameters) for stage in (first, later)]
    rest = outer if with_embeddings else [0, 0]
    old_depth, new_depth = np.meshgrid(np.arange(depth + 1.0), np.arange(depth + 1.0), indexing="ij")
    costs = []
    for stage in range(count):
        possible = (old_depth == 0) if stage == 0 else (old_depth > 0)
        cost = new * (new_depth - old_depth) + old * old_depth + rest[min(stage, 1)]
        costs.append(np.where(possible & (new_depth > old_depth), cost, np.inf))
    least, _ = best_depths(costs, largest=True)  # without it the program takes seconds, or minutes
    layers = tuple(int(number) for number in np.diff([0, *solve_program(costs, largest=True, limit=least)]))
    stage_bytes = tuple(
        new * number + old * sum(layers[:stage]) + rest[min(stage, 1)] for stage, number in enumerate(layers)
    )
    return PaperPlan(layers, stage_bytes, new * depth + rest[0])
