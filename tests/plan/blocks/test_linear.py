"""A linear's weights are cut as its kind says, and its bytes and operations are those counted by hand."""

from megatron_step.plan.blocks.linear import Handling, Linear
from megatron_step.plan.blocks.microbatch import Microbatch
from megatron_step.plan.blocks.tape import Tape

BY_ROWS = Linear("fc1", outputs=12, inputs=8, column_parallel=True, has_bias=True)
BY_COLUMNS = Linear("fc2", outputs=8, inputs=6, column_parallel=False)
BATCH = Microbatch(tokens=10, element_bytes=2, tensor=1, sequence_parallel=False)


def test_shapes_on_two_ranks() -> None:
    shapes = dict(BY_ROWS.weights(tensor=2, adapter_rank=4))
    a, b = "fc1.adapter.linear_in.weight", "fc1.adapter.linear_out.weight"
    assert shapes == {"fc1.weight": (6, 8), "fc1.bias": (6,), a: (2, 8), b: (6, 4)}
    a, b = "fc2.adapter.linear_in.weight", "fc2.adapter.linear_out.weight"
    assert dict(BY_COLUMNS.weights(2, 4)) == {"fc2.weight": (8, 3), a: (4, 3), b: (8, 2)}
    assert dict(BY_COLUMNS.weights(1, 0)) == {"fc2.weight": (8, 6)}


def test_a_frozen_weight_has_two_products_and_an_adapter_three_small_ones() -> None:
    assert BY_COLUMNS.flops(Handling(trained=True)) == 6 * 48
    assert BY_COLUMNS.flops(Handling(trained=False, adapter_rank=2)) == 4 * 48 + 6 * 2 * (8 + 6)
    assert BY_COLUMNS.forward_flops() == 2 * 48


def test_a_frozen_linear_keeps_nothing_and_its_backward_pass_makes_dx_alone() -> None:
    frozen = Handling(trained=False)
    assert BY_ROWS.input_bytes(BATCH, frozen) == BY_ROWS.adapter_kept(BATCH, frozen) == 0
    tape = Tape(0)
    BY_ROWS.backward(tape, BATCH, frozen)
    assert (tape.live, tape.peak) == (160, 160)


def test_what_the_backward_pass_makes_beside_dx() -> None:
    peaks = {}
    for name, how in {
        "trained": Handling(trained=True),
        "adapted": Handling(trained=False, adapter_rank=2),
        "8 bits": Handling(trained=False, dequantized=True),
    }.items():
        tape = Tape(0)
        BY_ROWS.backward(tape, BATCH, how)
        peaks[name] = tape.peak - 160
    adapter = 10 * 2 * (4 + 2 * 2) + 2 * ((4 + 2) * 8 + 2 * 12)
    assert peaks == {"trained": 12 * 8 * 2, "adapted": adapter, "8 bits": 12 * 8 * 2}
