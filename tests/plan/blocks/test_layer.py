"""A layer is its attention and its MLP: what it needs is the sum of what they need."""

from small_run import PLAIN, TIED, small_config

from megatron_step.plan.blocks.linear import Handling
from megatron_step.plan.blocks.microbatch import Microbatch
from megatron_step.plan.blocks.model import layer_blocks

BATCH = Microbatch(tokens=10, element_bytes=4, tensor=1, sequence_parallel=False)


def test_it_keeps_what_its_blocks_keep() -> None:
    for model in (PLAIN, TIED):
        layer = layer_blocks(small_config(model=model).model)
        handling = dict.fromkeys(layer.linears(), Handling(trained=True))
        core = layer.attention.core.linear(BATCH)
        use = layer.use(BATCH, handling, core, recomputes_core=False)
        assert use.kept == layer.attention.kept(BATCH, handling, core, False) + layer.mlp.kept(BATCH, handling)
        assert use.backward > use.kept


def test_a_training_step_takes_three_times_a_forward_pass() -> None:
    layer = layer_blocks(small_config().model)
    trained = dict.fromkeys(layer.linears(), Handling(trained=True))
    assert layer.flops(trained) == 3 * layer.forward_flops()
