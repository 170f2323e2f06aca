"""The integer program that chooses how many layers each stage adds (STEP, Yano et al., 2025).

With N_i = n_1 + ... + n_i, bytes a of a layer that a stage adds and trains, b of a layer that it found and adapts, and
c_i of the rest (embedding, output layer, final norm):

    P_i = a n_i + b N_(i-1) + c_i

    minimise over integers n_1, ..., n_K >= 1   max_i P_i     subject to   n_1 + ... + n_K = L

Among the solutions, that with the largest n_1 is taken, then that with the largest n_2, and so on: the model is deep
early.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mip  # type: ignore[import-untyped]

from megatron_step.config.run import RunConfig
from megatron_step.planner.memory import RECIPES, state_bytes
from megatron_step.planner.operators import GrownLayer
from megatron_step.planner.parameters import layer_parameters, outer_parameters
from megatron_step.planner.stages import Stage


def choose_layers(config: RunConfig, vocab_size: int) -> tuple[int, ...]:
    """Layers that each of `stages.count` stages adds so that the largest model states are smallest.

    Counted are the bytes of one tensor-parallel rank with the whole depth and one data-parallel rank, in the precision
    of the config. Pipeline ranks share them: what is smallest as a whole is taken to be smallest on each. Every part of
    the pipeline gets a layer in the first stage.

    Raises ValueError if old layers take as much memory as new ones, so that no choice is better than another, or if
    there are too few layers.
    """
    stages = config.stages
    if stages.count == 1:
        return (config.model.num_layers,)
    recipe = RECIPES[config.training.precision]
    first = _model_of((0,), index=0)
    later = _model_of((0, 1), index=1)
    old, new = (state_bytes(layer_parameters(config, later, layer), recipe) for layer in (0, 1))
    if old >= new:
        raise ValueError(
            "stages.layers auto: an old layer takes the memory of a new one (freeze.layers is false, or the adapters "
            "large), so that no choice of layers saves any; name them, as in stages.layers [5, 4, 3]"
        )
    return smallest_peak(
        new,
        old,
        state_bytes(outer_parameters(config, first, vocab_size), recipe),
        config.model.num_layers,
        stages.count,
        later_constant_bytes=state_bytes(outer_parameters(config, later, vocab_size), recipe),
        first_layers=config.parallel.pipeline_parallel_size * config.parallel.virtual_pipeline_size,
    )


def smallest_peak(
    new_layer_bytes: int,
    old_layer_bytes: int,
    constant_bytes: int,
    num_layers: int,
    count: int,
    *,
    later_constant_bytes: int | None = None,
    first_layers: int = 1,
) -> tuple[int, ...]:
    """n_1, ..., n_K of the program at the top of this file, with K = `count` and L = `num_layers`.

    `constant_bytes` is c_1; `later_constant_bytes` is c_2 = ... = c_K, None for the same. n_1 >= `first_layers`.

    Raises ValueError if there are too few layers, RuntimeError if the solver does not find the optimum.
    """
    if min(new_layer_bytes, count, first_layers) < 1 or min(old_layer_bytes, constant_bytes) < 0:
        raise ValueError("the program needs at least 1 byte a layer, 1 stage and 1 layer in it, and no negative bytes")
    if num_layers < first_layers + count - 1:
        raise ValueError(
            f"{num_layers} layers are too few for {count} stages: the first needs {first_layers}, each other one 1"
        )
    later = constant_bytes if later_constant_bytes is None else later_constant_bytes
    constants = (constant_bytes, *[later] * (count - 1))
    program = _Program(new_layer_bytes, old_layer_bytes, constants, num_layers, first_layers)
    peak = program.peak(program.solve())
    best: tuple[int, ...] = ()
    while len(best) < count:
        best = program.solve(peak, best)[: len(best) + 1]
    return best


@dataclass(frozen=True)
class _Program:
    new: int
    """a, in bytes."""
    old: int
    """b, in bytes."""
    constants: tuple[int, ...]
    """c_1, ..., c_K, in bytes."""
    num_layers: int
    """L."""
    first_layers: int
    """Lower bound of n_1."""

    def peak(self, n: Sequence[int]) -> int:
        """max_i P_i in bytes."""
        return max(self.new * n[i] + self.old * sum(n[:i]) + c for i, c in enumerate(self.constants))

    def solve(self, peak: int | None = None, known: tuple[int, ...] = ()) -> tuple[int, ...]:
        """n_1, ..., n_K of the smallest peak; or, given `peak` and the first numbers, those of the largest next one."""
        unit = self.num_layers * max(self.new, self.old)  # solvers compute best with numbers near one
        base = min(self.constants)
        model = mip.Model(solver_name=mip.CBC)
        model.verbose = 0
        model.max_mip_gap = model.max_mip_gap_abs = 0.0
        n = [model.add_var(var_type=mip.INTEGER, lb=1 if i else self.first_layers) for i in range(len(self.constants))]
        bound = model.add_var() if peak is None else (peak - base) / unit
        model += mip.xsum(n) == self.num_layers
        for i, c in enumerate(self.constants):
            model += self.new / unit * n[i] + self.old / unit * mip.xsum(n[:i]) + (c - base) / unit <= bound
        for i, number in enumerate(known):
            model += n[i] == number
        model.objective = mip.minimize(bound) if peak is None else mip.maximize(n[len(known)])
        status = model.optimize()
        if status is not mip.OptimizationStatus.OPTIMAL:
            raise RuntimeError(f"the solver did not find the best layers of the stages: {status.name}")
        return tuple(round(number.x) for number in n)


def _model_of(born: tuple[int, ...], index: int) -> Stage:
    """A stage whose layers were added by the stages `born`."""
    layers = tuple(GrownLayer((), of) for of in born)
    return Stage(index, layers, first_step=0, last_step=0, schedule_steps=0, grows=False, layout=(len(layers),))
