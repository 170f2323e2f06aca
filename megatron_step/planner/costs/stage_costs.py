"""Bytes and seconds of each pipeline rank in a stage, as a function of which of the stage's layers it holds.

To the planner a layer is new (trained) or old (as its policy says; on average, where old layers differ). A rank that
holds the layers x + 1, ..., y of a stage needs

    c + S(y) - S(x)                              model states
    + max(m + (f - 1) (K(y) - K(x)) + B(x, y), g)        activations, or growing into the stage

with S and K the sums of the layers' states and of what they keep from a forward to a backward pass, c the states of
embedding or head on that rank, g what growth needs for a layer at a time, f the micro-batches in flight there, m its
messages, and B the most that the backward pass of one micro-batch needs (planner/costs/activations.py). Differs from
planner/costs/memory.py by the padding of buckets.

A step of m micro-batches through P ranks of V chunks (1F1B; interleaved: Narayanan et al., 2021) takes

    (m + (P - 1) / V) t  +  the exchange of gradients and weights over data-parallel ranks

with t the seconds of a micro-batch on the slowest rank: its operations, and what tensor-parallel ranks exchange.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

import numpy as np
import numpy.typing as npt

from megatron_step.plan.blocks.tape import Use
from megatron_step.plan.old_layers import policy_of
from megatron_step.plan.operators import GrownLayer
from megatron_step.plan.resolved import ResolvedConfig
from megatron_step.plan.stages import Stage
from megatron_step.plan.states import Parameter
from megatron_step.planner.costs.activations import between_passes
from megatron_step.planner.costs.held import ChunkEnds, HeldEnds, LayerCost, held_parts
from megatron_step.planner.costs.machines import Machine
from megatron_step.planner.costs.memory import growth_bytes

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RankCost:
    """Bytes of a pipeline rank beside its layers."""

    state_bytes: int
    """c: model states of the embedding, or of the final norm and the output layer."""
    message_bytes: int
    """m."""
    in_flight: int
    """f, without virtual pipelines."""
    ends: tuple[ChunkEnds, ...]
    """The ends of each of its chunks."""
    growth_bytes: int
    """g."""
    flops: int
    """Operations of the output layer on this rank; 0 on other ranks."""
    reduced_bytes: int
    """Bytes of gradients of the embedding or the output layer that data-parallel ranks exchange."""


@dataclass(frozen=True)
class StageCosts:
    """Bytes of everything in a stage, before it is known which rank holds what."""

    new: LayerCost
    """A layer that the stage adds; in the first stage, every layer."""
    old: LayerCost
    """A layer of an earlier stage, on average."""
    ranks: tuple[RankCost, ...]
    """The pipeline ranks."""
    slots: float
    """m + (P - 1) / V: micro-batches that a step takes the time of."""


@dataclass(frozen=True)
class RunCosts:
    """Bytes of everything in a run, before it is known which stage adds which layers."""

    first: StageCosts
    """The first stage."""
    later: StageCosts
    """Any later stage."""

    def stage(self, index: int) -> StageCosts:
        """Costs of the stage with the number `index`, from 0."""
        return self.later if index else self.first


def run_costs(resolved: ResolvedConfig) -> RunCosts:
    """Return the costs of the stages of a run."""
    return RunCosts(stage_costs(resolved, first=True), stage_costs(resolved, first=False))


def stage_costs(resolved: ResolvedConfig, *, first: bool) -> StageCosts:
    """Return the costs of the `first` stage, or of any later one."""
    parallel, period = resolved.config.parallel, policy_of(resolved.config).period(resolved.config)
    stage = stage_of((0,), index=0) if first else stage_of((0,) * period + (1,), index=1)
    layers, ranks = held_parts(resolved, stage)
    weights = [parameter for layer in layers for parameter in layer.parameters]
    pipeline, virtual = parallel.pipeline_parallel_size, parallel.virtual_pipeline_size
    return StageCosts(
        new=layers[-1].cost,
        old=_mean([layer.cost for layer in layers[: 1 if first else period]]),
        ranks=tuple(_rank_cost(resolved, stage, number, chunks, weights) for number, chunks in enumerate(ranks)),
        slots=resolved.num_microbatches + (pipeline - 1) / virtual,
    )


def _mean(layers: Sequence[LayerCost]) -> LayerCost:
    """Mean of the layers' costs, rounded up; of the backward pass, which comes to one layer after another, the most."""

    def mean(values: Iterable[int]) -> int:
        return ceil(Fraction(sum(values), len(layers)))

    return LayerCost(
        state_bytes=mean(layer.state_bytes for layer in layers),
        use=Use(mean(layer.use.kept for layer in layers), max(layer.use.backward for layer in layers)),
        flops=mean(layer.flops for layer in layers),
        exchanged_bytes=mean(layer.exchanged_bytes for layer in layers),
        reduced_bytes=mean(layer.reduced_bytes for layer in layers),
    )


def _rank_cost(
    resolved: ResolvedConfig, stage: Stage, pp_rank: int, chunks: Sequence[HeldEnds], layers: Sequence[Parameter]
) -> RankCost:
    """Return the costs of a rank with `chunks`; `layers` are the weights of a layer of each kind."""
    batch, pipeline = resolved.batch, resolved.config.parallel.pipeline_parallel_size
    outer = [parameter for held in chunks for parameter in held.parameters]
    return RankCost(
        state_bytes=sum(held.state_bytes for held in chunks),
        message_bytes=between_passes(resolved, pp_rank),
        in_flight=min(resolved.num_microbatches, pipeline - pp_rank),
        ends=tuple(held.ends for held in chunks),
        growth_bytes=growth_bytes([*outer, *layers], stage),
        flops=sum(held.flops_per_token for held in chunks) * batch.tokens // batch.tensor,
        reduced_bytes=sum(held.reduced_bytes for held in chunks),
    )


def range_bytes(costs: StageCosts, is_new: Sequence[bool]) -> Array:
    """Bytes of each rank for each range of layers: [p, x, y] for the layers x + 1 to y, infinite where there is none.

    `is_new` says of each layer of the stage, bottom up, whether the stage adds it. Without virtual pipelines.
    """
    layers = [costs.new if new else costs.old for new in is_new]
    states = differences(sums([layer.state_bytes for layer in layers]))
    kept = sums([layer.use.kept for layer in layers])
    kept = kept[None, :] - kept[:, None]
    # [x, y]: the backward pass of the topmost layer y, in which all below it is still kept, and the same of those under
    top = np.full_like(states, -np.inf)
    for y, layer in enumerate(layers, start=1):
        top[:y, y] = kept[:y, y - 1] + layer.use.backward
    lower = np.full_like(top, -np.inf)
    lower[:, 1:] = np.maximum.accumulate(top, axis=1)[:, :-1]
    backward = {ends: _backward_bytes(ends, kept, top, lower) for (ends,) in {rank.ends for rank in costs.ranks}}
    needed = np.empty((len(costs.ranks), *states.shape))
    for rank, rank_bytes in zip(costs.ranks, needed):
        (ends,) = rank.ends
        rank_bytes[:] = backward[ends]
        rank_bytes += (rank.in_flight - 1) * kept
        rank_bytes += rank.message_bytes + (rank.in_flight - 1) * (ends.kept + (ends.head.kept if ends.head else 0))
        np.maximum(rank_bytes, rank.growth_bytes, out=rank_bytes)
        rank_bytes += states
        rank_bytes += rank.state_bytes
    return needed


def _backward_bytes(ends: ChunkEnds, kept: Array, top: Array, lower: Array) -> Array:
    """[x, y]: B."""
    if ends.head is None:
        highest = np.maximum(top, lower + ends.under_top)
    else:
        highest = np.maximum(np.maximum(top, lower) + ends.under_top, kept + ends.head.backward)
    bytes_: Array = np.maximum(ends.kept + highest, ends.embedding_backward)
    return bytes_


def range_seconds(costs: StageCosts, is_new: Sequence[bool], machines: Sequence[Machine]) -> Array:
    """Seconds of a step if the rank were the slowest: [p, x, y] as `range_bytes`."""
    seconds = []
    for rank, machine in zip(costs.ranks, machines):
        new, old = (layer_seconds(costs, layer, machine) for layer in (costs.new, costs.old))
        layers_seconds = sums(np.where(is_new, new, old))
        seconds.append(rank_seconds(costs, rank, machine) + differences(layers_seconds))
    return np.stack(seconds)


def layer_seconds(costs: StageCosts, layer: LayerCost, machine: Machine) -> float:
    """Seconds that a layer adds to a step."""
    microbatch_seconds = layer.flops / machine.flops + layer.exchanged_bytes / machine.tensor_bandwidth
    return costs.slots * microbatch_seconds + layer.reduced_bytes / machine.data_bandwidth


def rank_seconds(costs: StageCosts, rank: RankCost, machine: Machine) -> float:
    """Seconds of a step on a rank without layers."""
    return costs.slots * rank.flops / machine.flops + rank.reduced_bytes / machine.data_bandwidth


def sums(values: Sequence[float] | Array) -> Array:
    """Sums of the first 0, 1, ... values."""
    return np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])


def differences(sums: Array) -> Array:
    """[x, y]: the sum of the values x + 1 to y; infinite for y <= x."""
    ends = np.arange(len(sums))
    range_sums: Array = np.where(ends[:, None] < ends[None, :], sums[None, :] - sums[:, None], np.inf)
    return range_sums


def stage_of(born: tuple[int, ...], index: int) -> Stage:
    """Return a stage whose layers were added by the stages `born`."""
    layers = tuple(GrownLayer((), stage) for stage in born)
    old = tuple(layer for layer, stage in enumerate(born) if stage < index)
    return Stage(index, layers, 0, 0, 0, grows=False, layout=(len(layers),), turn_groups=(old,))
