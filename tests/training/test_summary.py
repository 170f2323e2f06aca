"""A stage's table counts every weight once, whatever rank holds it."""

import re
from typing import Any

import pytest
from serial_oracle import state_of
from small_run import VOCAB_SIZE, small_config
from worlds import Worlds

from megatron_step.config.run import RunConfig
from megatron_step.engine.parallel import parallel_layout
from megatron_step.plan.resolved import resolve
from megatron_step.planner.plan import make_plan
from megatron_step.training.summary import memory_summary, stage_summary

SECTIONS: dict[str, Any] = {
    "model": {"num_layers": 6, "num_query_groups": 2},
    "stages": {"count": 2, "layers": [4, 2], "layouts": "even"},
    "adapter": {"rank": 4},
}


@pytest.mark.parametrize(
    ("size", "layout"),
    [(1, {}), (2, {"tensor_parallel_size": 2}), (4, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2})],
)
def test_parameters_by_what_is_done_with_them(worlds: Worlds, size: int, layout: dict[str, Any]) -> None:
    text = worlds(size).run(summary, config=small_config(**SECTIONS, parallel=layout))[0]
    assert text.startswith("stage 2 of 2: 6 layers, 2 of them new")
    counts = {
        (status, name.strip()): int(number.replace(",", ""))
        for status, name, number in re.findall(r"^  (trained|frozen) +([a-z, ]+?) {2,}([\d,]+)", text, re.MULTILINE)
    }
    matrices = 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 96
    adapters = 4 * ((64 + 128) + (64 + 64) + (64 + 192) + (96 + 64))
    assert counts == {
        ("trained", "embedding, output layer"): 2 * 256 * 64,
        ("trained", "new layers"): 2 * (matrices + 2 * 64),
        ("trained", "adapters"): 4 * adapters,
        ("trained", "old layers, norms"): 4 * 2 * 64 + 64,
        ("frozen", "old layers, norms"): 4 * matrices,
    }


def test_the_rule_of_each_weight_is_named(worlds: Worlds) -> None:
    config = small_config(**SECTIONS, optimizer={"rule": "muon"}, parallel={"pipeline_parallel_size": 2})
    lines = worlds(2).run(summary, config=config)[0].splitlines()
    muon, adamw = (line.strip() for line in lines[-2:])
    assert muon == (
        "Muon (q, k and v apart, gate and up apart) trains 8 weights: mlp.linear_fc1, mlp.linear_fc2, "
        "self_attention.linear_proj, self_attention.linear_qkv"
    )
    assert adamw.startswith(
        f"AdamW trains {3 + 6 * 2 + 4 * 4 * 2} weights: decoder.final_layernorm, embedding.word_embedd"
    )
    assert "mlp.linear_fc1.adapter.linear_in" in adamw


def test_layers_that_rest_are_shown_apart(worlds: Worlds) -> None:
    sections = {**SECTIONS, "adapter": {}, "old_layers": {"policy": "rotate"}}
    sections["stages"] = {**SECTIONS["stages"], "steps": 40}
    (text,) = worlds(1).run(summary, config=small_config(**sections))
    lines = {line.split()[0]: line for line in text.splitlines() if "old layers, norms" in line}
    mib = 2 * (64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 96) * 8 / 2**20
    assert lines["resting"].endswith(f"0.0 MiB{mib:>10,.1f} MiB"), "two layers' moments, no gradients"
    assert set(lines) == {"trained", "resting"}


def test_memory_is_shown_for_every_rank() -> None:
    planned = {"frozen_weight_bytes": 3 << 20, "peak_bytes": 10 << 20}
    measured = {"frozen_weight_bytes": 3 << 20, "peak_bytes": (9 << 20) + (1 << 19)}
    lines = memory_summary([{"pp_rank": rank, "planned": planned, "measured": measured} for rank in range(2)])
    title, heading, *ranks = lines.splitlines()
    assert title.strip() == "memory in MiB, planned / measured"
    assert heading.split() == ["rank", "frozen", "weight", "peak"]
    assert [line.split() for line in ranks] == [[str(rank), "3.0", "/", "3.0", "10.0", "/", "9.5"] for rank in range(2)]


def summary(config: RunConfig) -> str:
    with parallel_layout(config.parallel, 1) as parallel:
        return stage_summary(state_of(config, 1, parallel), make_plan(resolve(config, VOCAB_SIZE)), config, parallel)
