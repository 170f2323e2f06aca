"""Find the layouts with the least memory or the least time for a stage with any number of old and new layers.

A stage grows the model from `old_depth` to `new_depth` layers; `old_depth` is 0 in the first stage. The growth operator
decides which layers are new. Each result is cached.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from megatron_step.plan.layout import num_chunks
from megatron_step.plan.operators import first_layers, grow, operator_of
from megatron_step.plan.resolved import ResolvedConfig
from megatron_step.plan.stages import even_layout
from megatron_step.planner.costs.machines import Machine
from megatron_step.planner.costs.pipeline_schedule import most_in_flight
from megatron_step.planner.costs.stage_costs import (
    RankCost,
    RunCosts,
    StageCosts,
    layer_seconds,
    range_bytes,
    range_seconds,
    rank_seconds,
    sums,
)
from megatron_step.planner.search.chunk_costs import ChunkCosts, Split
from megatron_step.planner.search.interleaved import interleaved_split, near_split
from megatron_step.planner.search.one_chunk import best_split

Array = npt.NDArray[np.float64]


class StageLayouts:
    """Layouts of any stage of a run, by the stage's depths `old_depth` and `new_depth`.

    Memory is the share of a rank's capacity, or bytes where the machines have no limit. Time is in seconds per
    optimizer step. The cost of a layout is the cost of its costliest rank.
    """

    def __init__(self, resolved: ResolvedConfig, costs: RunCosts, machines: Sequence[Machine], seconds: float) -> None:
        self._config = resolved.config
        self._machines = machines
        self._seconds = seconds  # time limit of a layout's integer program
        self._capacities = np.array([machine.capacity_bytes or 1 for machine in machines], dtype=np.float64)
        self._first, self._later = costs.first, costs.later
        self._in_flight = most_in_flight(resolved.config.parallel, resolved.num_microbatches)
        self.least_share = cache(self._least_share)
        self.fastest = cache(self._fastest)

    @property
    def old_layers_save(self) -> bool:
        """Whether an old layer takes less memory than a new one."""
        return self._later.old.state_bytes < self._later.new.state_bytes

    @property
    def bounds_rise(self) -> bool:
        """Whether a bound that `least_share` proves for a stage also holds for larger `new_depth` at its `old_depth`.

        It holds for searched layouts of virtual pipelines, if the growth operator inserts layers and keeps the order of
        the others (planner/search/two_chunks.py).
        """
        config = self._config
        searched = config.parallel.virtual_pipeline_size > 1 and config.stages.layouts == "auto"
        return searched and operator_of(config.growth).only_inserts

    def _least_share(self, old_depth: int, new_depth: int, thorough: bool = False) -> Split:
        """Return the layout whose costliest rank needs the least share of its memory.

        With virtual pipelines, return the best layout that the integer program finds in its time limit if `thorough`,
        else a good layout.
        """
        costs, is_new = self._stage(old_depth, new_depth)
        if self._config.stages.layouts == "even":
            return self._even(self._chunk_shares(costs, is_new), new_depth)
        if self._config.parallel.virtual_pipeline_size > 1:
            shares = self._chunk_shares(costs, is_new)
            return interleaved_split(shares, self._seconds) if thorough else near_split(shares)
        return _exact(self._shares(costs, is_new))

    def _fastest(self, old_depth: int, new_depth: int, limit: float, start: tuple[int, ...] = ()) -> Split:
        """Return the fastest layout in which no rank needs more than the share `limit` of its memory.

        With virtual pipelines, return a good layout. It is no slower than the layout `start` if `start` is within the
        limit.
        """
        costs, is_new = self._stage(old_depth, new_depth)
        if self._config.stages.layouts == "even":
            return self._even(self._chunk_seconds(costs, is_new), new_depth)
        if self._config.parallel.virtual_pipeline_size > 1:
            limits = [(self._chunk_shares(costs, is_new), limit)]
            start = start or self.least_share(old_depth, new_depth).layout
            return near_split(self._chunk_seconds(costs, is_new), limits, start)
        fits = self._shares(costs, is_new) <= limit * (1 + 1e-12)
        return _exact(np.where(fits, range_seconds(costs, is_new, self._machines), np.inf))

    def _even(self, costs: ChunkCosts, num_layers: int) -> Split:
        layout = self.even(num_layers)
        cost = float(costs.rank_costs(np.cumsum(layout).tolist()).max())
        return Split(cost, cost, layout)

    def even(self, num_layers: int) -> tuple[int, ...]:
        """Return the layers of each chunk if they are spread evenly over all chunks."""
        return even_layout(num_layers, len(self._in_flight))

    def share_bounds(self) -> Array:
        """Return lower bounds of the cost of `least_share`, [old_depth, new_depth]; infinite for impossible stages."""
        pipeline = self._config.parallel.pipeline_parallel_size

        def costs_of(costs: StageCosts) -> _RankCosts:
            in_flight = np.array(self._in_flight).reshape(-1, pipeline)  # [v, p]
            fewest = in_flight.min(axis=0)
            new, old = (layer.state_bytes + fewest * layer.use.kept for layer in (costs.new, costs.old))
            # Each chunk has at least one layer. A chunk may have more micro-batches in flight than the rank's `fewest`.
            more = (in_flight - fewest).sum(axis=0) * min(costs.new.use.kept, costs.old.use.kept)
            if len(in_flight) > 1:
                own = more + np.array(
                    [self._rank_bytes(costs, rank, pp_rank) for pp_rank, rank in enumerate(costs.ranks)]
                )
            else:  # layouts without virtual pipelines count only bytes in use at the same time
                own = np.array([rank.state_bytes + rank.message_bytes for rank in costs.ranks])
            return _RankCosts(own / self._capacities, new / self._capacities, old / self._capacities)

        return self._bounds(costs_of)

    def seconds_bounds(self) -> Array:
        """Return lower bounds of the cost of `fastest` in seconds, [old_depth, new_depth]."""

        def costs_of(costs: StageCosts) -> _RankCosts:
            pairs = list(zip(costs.ranks, self._machines))
            return _RankCosts(
                np.array([rank_seconds(costs, *pair) for pair in pairs]),
                np.array([layer_seconds(costs, costs.new, machine) for _, machine in pairs]),
                np.array([layer_seconds(costs, costs.old, machine) for _, machine in pairs]),
            )

        return self._bounds(costs_of)

    def _bounds(self, costs_of: Callable[[StageCosts], "_RankCosts"]) -> Array:
        depth, parallel = self._config.model.num_layers, self._config.parallel
        old_depth, new_depth = np.meshgrid(np.arange(depth + 1.0), np.arange(depth + 1.0), indexing="ij")
        bounds = costs_of(self._later).bounds(new_depth - old_depth, old_depth, parallel.virtual_pipeline_size)
        bounds[0] = costs_of(self._first).bounds(new_depth[0], old_depth[0], parallel.virtual_pipeline_size)
        chunks = num_chunks(parallel)
        impossible = (new_depth < old_depth) | (new_depth < chunks)
        return np.where(impossible, np.inf, bounds)

    def _stage(self, old_depth: int, new_depth: int) -> tuple[StageCosts, list[bool]]:
        """Return the costs of a stage, and for each layer from the bottom up whether it is new."""
        if old_depth == 0:
            return self._first, [True] * new_depth
        layers = first_layers(old_depth, start_from_checkpoint=False)
        grown = grow(layers, new_depth - old_depth, 1, self._config.growth, self._config.training.seed)
        return self._later, [layer.born == 1 for layer in grown]

    def _shares(self, costs: StageCosts, is_new: Sequence[bool]) -> Array:
        """Return the share of memory that rank p needs for the layers x + 1, ..., y: [p, x, y]."""
        shares = range_bytes(costs, is_new)
        shares /= self._capacities[:, None, None]
        return shares

    def _chunk_shares(self, costs: StageCosts, is_new: Sequence[bool]) -> ChunkCosts:
        """Return two kinds of shares of memory: in training, and while the model grows into the stage.

        In training, each chunk counts with the most micro-batches that it ever has in flight.
        """

        def layer_sums(in_flight: Sequence[int]) -> Array:
            new, old = (
                np.array([layer.state_bytes + count * layer.use.kept for count in in_flight])
                for layer in (costs.new, costs.old)
            )
            per_layer = np.where(np.array(is_new)[None, :], new[:, None], old[:, None])
            return np.stack([sums(layer_bytes) for layer_bytes in per_layer])

        training = [self._rank_bytes(costs, rank, pp_rank) for pp_rank, rank in enumerate(costs.ranks)]
        growing = [rank.state_bytes + rank.growth_bytes for rank in costs.ranks]
        chunk_capacities = np.tile(self._capacities, len(self._in_flight) // len(costs.ranks))[:, None]
        return ChunkCosts(
            sums=np.stack([layer_sums(self._in_flight), layer_sums([0] * len(self._in_flight))]) / chunk_capacities,
            constants=np.array([training, growing]) / self._capacities,
        )

    def _rank_bytes(self, costs: StageCosts, rank: RankCost, pp_rank: int) -> float:
        """Return a rank's bytes beside its layers, with the most that the backward pass of a layer or head adds."""
        parts = [(costs.new.use, True), (costs.old.use, True)]
        total = rank.state_bytes + rank.message_bytes
        for chunk, ends in enumerate(rank.ends):
            in_flight = self._in_flight[chunk * len(costs.ranks) + pp_rank]
            total += in_flight * (ends.kept + (ends.head.kept if ends.head else 0))
            parts += [(ends.head, False)] if ends.head else []
        return total + max(use.backward - use.kept + rank.ends[-1].under_top * is_layer for use, is_layer in parts)

    def _chunk_seconds(self, costs: StageCosts, is_new: Sequence[bool]) -> ChunkCosts:
        def per_layer(machine: Machine) -> list[float]:
            return [layer_seconds(costs, costs.new if new else costs.old, machine) for new in is_new]

        num_ranks, num_chunks = len(costs.ranks), len(self._in_flight)
        return ChunkCosts(
            sums=np.stack([sums(per_layer(self._machines[chunk % num_ranks])) for chunk in range(num_chunks)])[None],
            constants=np.array([[rank_seconds(costs, *pair) for pair in zip(costs.ranks, self._machines)]]),
        )


def _exact(costs: Array) -> Split:
    cost, layout = best_split(costs)
    return Split(cost, cost, layout)


@dataclass(frozen=True)
class _RankCosts:
    """Lower bounds of each rank's cost."""

    own: Array
    """[p]: cost of rank p without layers."""
    new: Array
    """[p]: cost of a new layer on rank p."""
    old: Array
    """[p]: cost of an old layer on rank p."""

    def bounds(self, num_new: Array, num_old: Array, least_layers: int) -> Array:
        """Return a lower bound of the costliest rank's cost in any layout of `num_new` new and `num_old` old layers.

        Each rank holds at least `least_layers` layers. If no rank costs more than t, rank p holds x new and y old
        layers with own_p + new_p x + old_p y <= t. Let a new layer count r old ones, and weight rank p by
        w_p = max(1 / old_p, r / new_p). The weighted sum over ranks is

            sum of w_p own_p + num_old + r num_new  <=  t sum of w_p

        For the best r this bound of t is the dual of the linear program. The best r is new_p / old_p of some rank p.
        """
        bounds = np.full_like(num_new, (self.own + least_layers * np.minimum(self.new, self.old)).max())
        for price in set((self.new / self.old).tolist()):
            weights = np.maximum(1 / self.old, price / self.new)
            together = ((weights * self.own).sum() + num_old + price * num_new) / weights.sum()
            bounds = np.maximum(bounds, together)
        return bounds
