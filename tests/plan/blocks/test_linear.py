"""A linear's weights are cut as its kind says, and its bytes and operations are those counted by hand."""

from dataclasses import replace

from megatron_step.plan.blocks.linear import Handling, Linear
from megatron_step.plan.blocks.microbatch import Microbatch

BY_ROWS = Linear("fc1", outputs=12, inputs=8, column_parallel=True, has_bias=True)
BY_COLUMNS = Linear("fc2", outputs=8, inputs=6, column_parallel=False)
BATCH = Microbatch(tokens=10, element_bytes=2, tensor=1, sequence_parallel=False)
TRAINED, FROZEN, ADAPTED = Handling(trained=True), Handling(trained=False), Handling(trained=False, adapter_rank=4)


def test_shapes_on_two_ranks() -> None:
    two = replace(BATCH, tensor=2)
    a, b = "fc1.adapter.linear_in.weight", "fc1.adapter.linear_out.weight"
    assert dict(BY_ROWS.costs(two, ADAPTED).weights) == {"fc1.weight": (6, 8), "fc1.bias": (6,), a: (2, 8), b: (6, 4)}
    a, b = "fc2.adapter.linear_in.weight", "fc2.adapter.linear_out.weight"
    assert dict(BY_COLUMNS.costs(two, ADAPTED).weights) == {"fc2.weight": (8, 3), a: (4, 3), b: (8, 2)}
    assert dict(BY_COLUMNS.costs(BATCH, FROZEN).weights) == {"fc2.weight": (8, 6)}


def test_a_frozen_weight_has_two_products_and_an_adapter_three_small_ones() -> None:
    assert BY_COLUMNS.costs(BATCH, TRAINED).flops == 6 * 48
    assert BY_COLUMNS.costs(BATCH, ADAPTED).flops == 4 * 48 + 6 * 4 * (8 + 6)
    assert BY_COLUMNS.costs(BATCH, ADAPTED).forward_flops == 2 * 48


def test_a_frozen_linear_keeps_nothing_and_its_backward_pass_makes_dx_alone() -> None:
    costs = BY_ROWS.costs(BATCH, FROZEN)
    assert (costs.input_bytes, costs.adapter_bytes, costs.kept) == (0, 0, 0)
    assert (costs.backward.live, costs.backward.peak) == (160, 160)


def test_an_adapter_keeps_the_input_and_its_product_with_a() -> None:
    costs = BY_ROWS.costs(BATCH, ADAPTED)
    assert (costs.input_bytes, costs.adapter_bytes, costs.kept) == (160, 4 * 10 * 4, 320)


def test_what_the_backward_pass_makes_beside_dx() -> None:
    made = {
        name: BY_ROWS.costs(BATCH, handling).backward.peak - 160
        for name, handling in {
            "trained": TRAINED,
            "adapted": ADAPTED,
            "8 bits": Handling(trained=False, dequantized=True),
        }.items()
    }
    adapter = 10 * 4 * (4 + 2 * 2) + 4 * ((4 + 2) * 8 + 2 * 12)
    assert made == {"trained": 12 * 8 * 2, "adapted": adapter, "8 bits": 12 * 8 * 2}
