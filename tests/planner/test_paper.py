"""The paper's program on real configs."""

import pytest
from small_corpus import REPOSITORY
from small_run import VOCAB_SIZE, small_config

from megatron_step.config.load import load_config
from megatron_step.plan.resolved import resolve
from megatron_step.planner.paper import paper_plan


def test_bytes_are_those_of_the_formula() -> None:
    path = str(REPOSITORY / "examples/paper/368m.yaml")
    config = load_config(["--config", path, "--freeze.norms", "true"])
    plan = paper_plan(resolve(config, 32000), 3, with_embeddings=False)
    assert plan.layers == (11, 8, 5)
    layer = 4 * 1024**2 + 3 * 1024 * 2736 + 2 * 1024
    # Four linears, the first of which are query, key and value in one and gate and up in one.
    adapters = 128 * ((1024 + 3 * 1024) + 2 * 1024 + (1024 + 2 * 2736) + (2736 + 1024))
    before = 0
    for number, stage_bytes in zip(plan.layers, plan.stage_bytes):
        assert stage_bytes == 16 * number * layer + before * (2 * layer + 16 * adapters)
        before += number
    assert plan.vanilla_bytes == 16 * 24 * layer
    assert plan.reduction == 1 - max(plan.stage_bytes) / plan.vanilla_bytes


def test_embeddings_are_trained_in_every_stage() -> None:
    config = small_config()
    without, with_them = (paper_plan(resolve(config, VOCAB_SIZE), 2, with_embeddings=flag) for flag in (False, True))
    rest = 16 * (2 * config.model.padded_vocab_size(VOCAB_SIZE) * 64 + 64)
    assert with_them.vanilla_bytes == without.vanilla_bytes + rest
    assert [more - less for more, less in zip(with_them.stage_bytes, without.stage_bytes)] == [rest, rest]


@pytest.mark.parametrize(("name", "millions"), [("368m", 368.0), ("680m", 680.4), ("1.2b", 1198)])
def test_examples_have_the_sizes_they_say(name: str, millions: float) -> None:
    config = load_config(["--config", str(REPOSITORY / f"examples/paper/{name}.yaml")])
    plan = paper_plan(resolve(config, 32000), 1, with_embeddings=True)
    assert plan.vanilla_bytes / 16 / 1e6 == pytest.approx(millions, rel=2e-3)


def test_more_stages_than_layers() -> None:
    with pytest.raises(ValueError, match="5 stages cannot share 4 layers, .* at most 4 stages"):
        paper_plan(resolve(small_config(), VOCAB_SIZE), 5, with_embeddings=False)
