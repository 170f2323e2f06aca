"""What a stage trains: for each weight, by its key in checkpoints, whether it is trained and since when.

    weight                                 after growth                       states since
    embedding, output layer, final norm    trained, unless freeze.*           the first stage
    new layers                             trained                            this stage
    old layers and their adapters          as their policy says (plan/old_layers.py)

In the first stage all is trained.
"""

from collections.abc import Sequence

from megatron_step.config.run import RunConfig
from megatron_step.plan.names import in_layer, is_embedding, is_output_layer, layer_of
from megatron_step.plan.old_layers import Treatment, policy_of, turn_at
from megatron_step.plan.stages import Stage


def treatment(key: str, stage: Stage, config: RunConfig, turn: int = 0) -> Treatment:
    """Return what `stage` does with the weight `key`, after `turn` changes of its old layers."""
    freeze, grown = config.freeze, stage.index > 0
    if is_embedding(key):
        return Treatment(not (grown and freeze.embedding), "embedding", 0)
    if is_output_layer(key):
        return Treatment(not (grown and freeze.output_layer), "embedding", 0)
    if layer_of(key) < 0:
        return Treatment(not (grown and freeze.final_norm), "base", 0)
    born = stage.layers[layer_of(key)].born
    if born == stage.index:
        return Treatment(True, "new_layer" if grown else "base", born)
    return policy_of(config).treatment(key, turn, stage, config)


def updates(key: str, stages: Sequence[Stage], config: RunConfig, step: int) -> int:
    """Return how many updates the optimizer states of the trained weight `key` have seen after `step` steps of the run.

    `stages` are those of the run up to the one that the model has.
    """
    *earlier, stage = stages
    steps, layer = step - stage.first_step, layer_of(key)
    is_old = layer >= 0 and stage.layers[layer].born < stage.index
    seen = policy_of(config).updates(key, steps, stage, config) if is_old else steps
    if treatment(key, stage, config, turn_at(step, stage, config)).since == stage.index:
        return seen
    return seen + updates(key_before(key, stage), earlier, config, stage.first_step)


def key_before(key: str, stage: Stage) -> str:
    """Return the key that a weight of `stage`, which the previous stage had, too, has in that stage."""
    layer = layer_of(key)
    return key if layer < 0 else in_layer(key, stage.layers[layer].sources[0])
