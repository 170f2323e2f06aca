"""What a stage trains: for each weight, by its key in checkpoints, whether it is trained and since when.

    weight                                 after growth                       states since
    embedding, output layer, final norm    trained, unless freeze.*           the first stage
    new layers                             trained                            this stage
    old layers and their adapters          as their policy says (plan/old_layers.py)

In the first stage all is trained.
"""

from megatron_step.config.run import RunConfig
from megatron_step.plan.names import is_embedding, is_output_layer, layer_of
from megatron_step.plan.old_layers import Treatment, policy_of
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
