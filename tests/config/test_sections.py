"""Values of a YAML file are held against the keys of the sections."""

from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_step.config.run import RunConfig
from megatron_step.config.sections import (
    check_complete,
    dotted_names,
    expectation,
    in_short,
    read_sections,
    section_keys,
)

_SECTIONS = [name for name in section_keys(RunConfig) if is_dataclass(section_keys(RunConfig)[name].kind)]


def test_the_names_of_all_keys() -> None:
    names = list(dotted_names(RunConfig))
    assert {"output_dir", "model", "model.rope_scaling.factor", "training.ramp_up.start"} <= set(names)


@pytest.mark.parametrize("name", _SECTIONS)
def test_a_section_whose_keys_are_all_commented_out_is_one_that_is_left_out(name: str) -> None:
    assert read_sections({name: None}, RunConfig) == {}


def test_null_stays_where_it_means_something() -> None:
    assert read_sections({"training": {"ramp_up": None}}, RunConfig) == {"training": {"ramp_up": None}}


@pytest.mark.parametrize("name", [*_SECTIONS, "model.rope_scaling", "training.ramp_up"])
@pytest.mark.parametrize("value", [[1, 2], [], 5, True, "text", 1.5])
def test_another_value_than_a_section_is_refused(name: str, value: Any) -> None:
    *sections, last = name.split(".")
    values = {last: value}
    for section in sections:
        values = {section: values}
    with pytest.raises(ValueError, match=rf"{name} is .*: it must be a section, with keys such as \w+"):
        read_sections(values, RunConfig)


def test_a_section_may_lie_in_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text("num_layers: 2\n")
    assert read_sections({"model": f"{tmp_path}/model.yaml"}, RunConfig) == {"model": {"num_layers": 2}}
    (tmp_path / "model.yaml").write_text("num_layers: 2\nnum_layers: 3\n")
    with pytest.raises(ValueError, match="num_layers is given twice, in lines 1 and 2"):
        read_sections({"model": f"{tmp_path}/model.yaml"}, RunConfig)


def test_missing_keys_and_empty_ones_are_named() -> None:
    with pytest.raises(ValueError, match=r"lacks output_dir"):
        check_complete({}, RunConfig)
    with pytest.raises(ValueError, match=r"lacks model.num_layers, model.hidden_size"):
        check_complete({"output_dir": "x"}, RunConfig)
    complete: dict[str, Any] = {
        "output_dir": "x",
        "model": {"num_layers": 1, "hidden_size": 1, "ffn_hidden_size": 1, "num_attention_heads": 1, "seq_length": 1},
        "data": {"train": [], "tokenizer": ""},
        "optimizer": {"learning_rate": 1},
        "training": {"global_batch_size": 1, "micro_batch_size": 1},
    }
    check_complete(complete, RunConfig)
    for ramp_up, message in [({"start": 1}, "lacks training.ramp_up.increment, training.ramp_up.samples"), (None, "")]:
        training = {**complete["training"], "ramp_up": ramp_up}
        if ramp_up is None:
            check_complete({**complete, "training": training}, RunConfig)
        else:
            with pytest.raises(ValueError, match=message):
                check_complete({**complete, "training": training}, RunConfig)
    with pytest.raises(ValueError, match=r"schedule.warmup_steps is empty \(null\).* its default 0"):
        check_complete({**complete, "schedule": {"warmup_steps": None}}, RunConfig)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("model.num_layers", "a whole number"),
        ("model.num_query_groups", "a whole number or null"),
        ("training.precision", "one of bf16, bf16_weights, fp32"),
        ("stages.layers", "auto or a list, each entry a whole number"),
        ("data.split", "a list of a number and a number or null"),
        ("model.tie_embeddings", "true or false"),
    ],
)
def test_what_a_key_takes_in_words(key: str, words: str) -> None:
    assert expectation(RunConfig, key) == words


def test_a_value_is_shown_in_one_short_line() -> None:
    assert in_short("abc") == "abc"
    assert in_short("a\nb") == r"'a\nb'"
    assert len(in_short([1] * 1000)) < 200
