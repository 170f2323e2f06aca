"""An attention's weights and bytes follow its switches."""

from dataclasses import replace

from small_run import PLAIN, TIED, small_config

from megatron_step.config.stages import Target
from megatron_step.plan.blocks.attention import Attention
from megatron_step.plan.blocks.linear import Handling
from megatron_step.plan.blocks.microbatch import Microbatch
from megatron_step.plan.blocks.tape import BlockCosts
from megatron_step.plan.resolved import layer_blocks

BATCH = Microbatch(tokens=10, element_bytes=4, tensor=1, sequence_parallel=False)
FROZEN: dict[Target, Handling] = {"qkv": Handling(trained=False), "proj": Handling(trained=False)}


def frozen_costs(attention: Attention) -> BlockCosts:
    linears = {target: linear.costs(BATCH, FROZEN[target]) for target, linear in attention.linears().items()}
    return attention.costs(BATCH, linears, attention.core.linear(BATCH), False)


def test_weights_follow_the_switches() -> None:
    names = [
        [name for name, _ in frozen_costs(layer_blocks(small_config(model=model).model).attention).weights]
        for model in (PLAIN, TIED)
    ]
    assert set(names[1]) - set(names[0]) == {
        "self_attention.linear_qkv.bias",
        "self_attention.q_layernorm.weight",
        "self_attention.k_layernorm.weight",
    }


def test_norms_of_queries_and_keys_keep_both_before_them() -> None:
    attention = replace(layer_blocks(small_config(model=PLAIN).model).attention, groups=4)
    normed, plain = (frozen_costs(replace(attention, qk_norm=flag)).kept for flag in (True, False))
    scales = 4 * 10 * (4 + 4)
    assert normed - plain == attention.core.queries(BATCH) + attention.core.keys(BATCH) + scales
