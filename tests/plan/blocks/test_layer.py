"""A layer is its attention and its MLP: what it needs is the sum of what they need."""

from small_run import PLAIN, TIED, small_config

from megatron_step.plan.blocks.layer import Layer, LayerCosts
from megatron_step.plan.blocks.linear import Handling
from megatron_step.plan.blocks.microbatch import Microbatch
from megatron_step.plan.resolved import layer_blocks

BATCH = Microbatch(tokens=10, element_bytes=4, tensor=2, sequence_parallel=False)
TRAINED = Handling(trained=True)


def trained_costs(layer: Layer, recomputed: bool = False) -> LayerCosts:
    handling = dict.fromkeys(layer.linears(), TRAINED)
    return layer.costs(BATCH, handling, layer.attention.core.linear(BATCH), "full" if recomputed else "none")


def test_it_keeps_what_its_blocks_keep() -> None:
    for model in (PLAIN, TIED):
        layer = layer_blocks(small_config(model=model).model)
        linears = {target: linear.costs(BATCH, TRAINED) for target, linear in layer.linears().items()}
        attention = layer.attention.costs(BATCH, linears, layer.attention.core.linear(BATCH), False)
        mlp, costs = layer.mlp.costs(BATCH, linears), trained_costs(layer)
        assert costs.use.kept == attention.kept + mlp.kept
        assert costs.use.backward > costs.use.kept
        assert costs.weights == (*attention.weights, *mlp.weights)


def test_a_recomputed_layer_keeps_its_input_and_takes_a_second_forward_pass() -> None:
    layer = layer_blocks(small_config().model)
    kept, recomputed = trained_costs(layer), trained_costs(layer, recomputed=True)
    stream = 4 * 10 * 64
    assert recomputed.use.kept == stream
    assert recomputed.use.backward == kept.use.backward + stream
    assert kept.flops == recomputed.flops == 3 * recomputed.recomputed_flops
    assert kept.recomputed_flops == 0
    assert (kept.exchanged_bytes, recomputed.exchanged_bytes) == (4 * stream, 6 * stream)


def test_linears_are_numbered_in_one_order() -> None:
    """The order seeds the dropout of their adapters."""
    assert list(layer_blocks(small_config().model).linears()) == ["qkv", "proj", "fc1", "fc2"]
