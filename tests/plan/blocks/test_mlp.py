"""A gated MLP has gate and up in one matrix, and keeps both."""

from dataclasses import replace

from small_run import small_config

from megatron_step.config.stages import Target
from megatron_step.plan.blocks.linear import Handling
from megatron_step.plan.blocks.microbatch import Microbatch
from megatron_step.plan.blocks.mlp import Mlp
from megatron_step.plan.resolved import layer_blocks

BATCH = Microbatch(tokens=10, element_bytes=4, tensor=1, sequence_parallel=False)
FROZEN: dict[Target, Handling] = {"fc1": Handling(trained=False), "fc2": Handling(trained=False)}


def kept_bytes(mlp: Mlp) -> int:
    linears = {target: linear.costs(BATCH, FROZEN[target]) for target, linear in mlp.linears().items()}
    return mlp.costs(BATCH, linears).kept


def test_gate_and_up_are_in_one_matrix_and_both_are_kept() -> None:
    mlp = layer_blocks(small_config().model).mlp
    plain = replace(mlp, gated=False)
    assert mlp.fc1.outputs == 2 * plain.fc1.outputs == 2 * mlp.ffn
    assert kept_bytes(mlp) - kept_bytes(plain) == BATCH.split(mlp.ffn)


def test_a_model_without_a_gate_has_none() -> None:
    assert not layer_blocks(small_config(model={"mlp": "gelu"}).model).mlp.gated
