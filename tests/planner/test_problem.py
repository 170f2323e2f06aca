"""The integer program finds what exhaustive search finds, and the values worked out for the paper's model."""

from itertools import product
from unittest.mock import patch

import mip
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import VOCAB_SIZE, small_config

from megatron_step.planner.memory import PAPER_RECIPE, stage_memory
from megatron_step.planner.plan import make_plan
from megatron_step.planner.problem import choose_layers, smallest_peak

# d 1024, L 24, d_ff 2736; LoRA of rank 128 on all seven linears of Llama, as the paper counts.
LAYER = 4 * 1024**2 + 3 * 1024 * 2736 + 2 * 1024
LORA = 128 * (8 * 1024 + 3 * (1024 + 2736))
NEW = PAPER_RECIPE.trained_bytes * LAYER
OLD = PAPER_RECIPE.weight_bytes * LAYER + PAPER_RECIPE.trained_bytes * LORA
EMBEDDINGS = PAPER_RECIPE.trained_bytes * 2 * 32000 * 1024


def peak(n: tuple[int, ...], new: int, old: int, constants: list[int]) -> int:
    return max(new * n[i] + old * sum(n[:i]) + c for i, c in enumerate(constants))


@pytest.mark.parametrize(
    ("count", "layers", "saving", "saving_with_embeddings"),
    [(2, (14, 10), 0.395, 0.325), (3, (11, 8, 5), 0.519, 0.426)],
)
def test_the_worked_values(count: int, layers: tuple[int, ...], saving: float, saving_with_embeddings: float) -> None:
    for constant, expected in ((0, saving), (EMBEDDINGS, saving_with_embeddings)):
        assert smallest_peak(NEW, OLD, constant, 24, count) == layers
        share = peak(layers, NEW, OLD, [constant] * count) / (24 * NEW + constant)
        assert 1 - share == pytest.approx(expected, abs=5e-4)


@settings(max_examples=40, deadline=None)
@given(
    new=st.integers(1, 10**9),
    old_share=st.floats(0, 1.5),
    constant_share=st.floats(0, 10),
    later_share=st.floats(0, 1),
    count=st.integers(1, 4),
    first=st.integers(1, 3),
    spare=st.integers(0, 6),
)
def test_the_same_as_exhaustive_search(
    new: int, old_share: float, constant_share: float, later_share: float, count: int, first: int, spare: int
) -> None:
    old, constant, num_layers = round(old_share * new), round(constant_share * new), first + count - 1 + spare
    later = round(later_share * constant)
    constants = [constant] + [later] * (count - 1)
    candidates = [n for n in product(range(1, num_layers + 1), repeat=count) if sum(n) == num_layers and n[0] >= first]
    smallest = min(peak(n, new, old, constants) for n in candidates)
    found = smallest_peak(new, old, constant, num_layers, count, later_constant_bytes=later, first_layers=first)
    assert found in candidates
    # Solvers compute in floating point: solutions that differ by less than that are equal to them.
    assert peak(found, new, old, constants) <= smallest * (1 + 1e-6) + 1
    as_good = [n for n in candidates if peak(n, new, old, constants) <= peak(found, new, old, constants)]
    assert found == max(as_good)


def test_no_integer_solution_beats_the_continuous_one() -> None:
    share = OLD / NEW  # a = 1/8 + E / P
    for count in (2, 3, 4):
        bound = share / (1 - (1 - share) ** count)
        found = peak(smallest_peak(NEW, OLD, 0, 24, count), NEW, OLD, [0] * count) / (24 * NEW)
        assert bound <= found <= bound * 1.1


def test_of_equally_good_solutions_the_model_is_deep_early() -> None:
    # The first stage decides the peak: the others can have anything.
    assert smallest_peak(10, 1, 0, 6, 3, later_constant_bytes=0, first_layers=3) == (3, 2, 1)


def test_the_solver_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    smallest_peak(NEW, OLD, EMBEDDINGS, 24, 3)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("arguments", [(0, 1, 0, 5, 2), (5, -1, 0, 5, 2), (5, 1, 0, 5, 0)])
def test_impossible_bytes_are_refused(arguments: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least 1 byte"):
        smallest_peak(*arguments)


def test_too_few_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="3 layers are too few for 4 stages"):
        smallest_peak(5, 1, 0, 3, 4)


def test_an_answer_that_is_not_the_optimum_is_refused() -> None:
    with (
        patch.object(mip.Model, "optimize", return_value=mip.OptimizationStatus.FEASIBLE),
        pytest.raises(RuntimeError, match="did not find the best layers of the stages: FEASIBLE"),
    ):
        smallest_peak(NEW, OLD, 0, 24, 3)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("tensor", [1, 2])
def test_the_plan_has_the_smallest_peak_of_the_config(precision: str, tensor: int) -> None:
    def states(layers: str | list[int]) -> int:
        config = small_config(
            model={"num_layers": 8, "num_query_groups": 2},
            stages={"count": 3, "layers": layers},
            parallel={"tensor_parallel_size": tensor},
            training={"precision": precision},
        )
        plan = make_plan(config, VOCAB_SIZE)
        return max(stage_memory(config, stage, VOCAB_SIZE, 1)[0].model_state_bytes for stage in plan.stages)

    others = [states(list(n)) for n in product(range(1, 7), repeat=3) if sum(n) == 8]
    assert states("auto") <= min(others) * 1.01  # the program leaves out padding


def test_one_stage_has_all_layers() -> None:
    assert choose_layers(small_config(), VOCAB_SIZE) == (4,)


def test_the_first_stage_fills_the_pipeline() -> None:
    config = small_config(
        model={"num_layers": 6},
        stages={"count": 3},
        parallel={"pipeline_parallel_size": 2, "virtual_pipeline_size": 2},
    )
    assert choose_layers(config, VOCAB_SIZE) == (4, 1, 1)


def test_layers_that_save_nothing_are_refused() -> None:
    config = small_config(stages={"count": 2}, freeze={"layers": False})
    with pytest.raises(ValueError, match=r"no choice of layers saves any; name them"):
        choose_layers(config, VOCAB_SIZE)
