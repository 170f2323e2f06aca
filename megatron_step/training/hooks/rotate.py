"""The next turn of a rotation: other old layers are trained, with the optimizer states that waited on the host.

The result equals that of saving a checkpoint before the turn and loading it after, bit by bit: the states of a weight
come together from the data-parallel ranks that had them, and go to those that the new optimizer makes their owners.
"""

from megatron.core.optimizer import MegatronOptimizer

from megatron_step.config.run import RunConfig
from megatron_step.engine.parallel import Parallel
from megatron_step.model.build import Sharded, sharded_weights
from megatron_step.optim.owned import Held, held
from megatron_step.optim.resting import gathered, on_host, take
from megatron_step.plan.states import Recipe, training_recipe
from megatron_step.training.state import TrainState, next_turn


def rotate(state: TrainState, config: RunConfig, parallel: Parallel) -> None:
    """Train the layers of the turn that the state has reached, in place. Every rank must call it.

    All states pass through the host: the old optimizer is released before the new one exists, so that the device needs
    no more memory than in training. Beside it, one weight's states are whole on the device at a time.
    """
    recipe = training_recipe(config)
    waiting = _to_host(state, recipe, parallel)
    next_turn(state, config, parallel)
    for name, shard in sharded_weights(state.chunks, parallel).items():
        if name in waiting:
            assert state.optimizer is not None
            _hand_over(state.optimizer, shard, waiting.pop(name), recipe, parallel)


def _to_host(state: TrainState, recipe: Recipe, parallel: Parallel) -> dict[str, Held | None]:
    """Return what this rank has, now on the host, of each weight with states on any data-parallel rank, by name."""
    assert state.optimizer is not None
    waiting: dict[str, Held | None] = {}
    for name, shard in sharded_weights(state.chunks, parallel).items():
        if shard.data.requires_grad:
            own = held(state.optimizer, shard.data)
            waiting[name] = None if own is None else on_host(own, shard, recipe, parallel)
        elif shard.data.rests:
            waiting[name] = shard.data.resting
    return waiting


def _hand_over(
    optimizer: MegatronOptimizer, shard: Sharded, earlier: Held | None, recipe: Recipe, parallel: Parallel
) -> None:
    """Give a weight's states, of which this rank had `earlier`, to the ranks that have them in the new turn."""
    now = held(optimizer, shard.data)
    stays_at_rest = now is not None and now is earlier
    if stays_at_rest or not (shard.data.requires_grad or shard.data.rests):
        return
    whole = gathered(earlier, shard, recipe, parallel)
    if now is not None:
        take(whole, shard, now)
    if shard.data.requires_grad:
        shard.data.resting = None
