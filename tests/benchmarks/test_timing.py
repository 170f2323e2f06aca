import json
import time

import pytest

from benchmarks.timing import interleave, percentile, spread, table, write_json


def test_arms_take_turns_and_warm_up_is_not_counted():
    calls = []
    seconds = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, warmup=2)
    assert calls == ["a", "b"] * 5
    assert [len(values) for values in seconds.values()] == [3, 3]


def test_seconds_are_those_of_the_arm():
    seconds = interleave({"slow": lambda: time.sleep(0.02), "fast": lambda: None}, repeats=2)
    assert min(seconds["slow"]) >= 0.02 > min(seconds["fast"])


def test_no_repeats_is_an_error():
    with pytest.raises(ValueError, match="--repeats must be at least 1, not 0"):
        interleave({"a": lambda: None}, repeats=0)


def test_percentiles_lie_between_neighbours():
    values = [40.0, 10.0, 30.0, 20.0, 50.0]
    assert percentile(values, 0.0) == 10.0
    assert percentile(values, 0.1) == pytest.approx(14.0)
    assert percentile(values, 1.0) == 50.0
    assert percentile([7.0], 0.9) == 7.0
    assert spread(values, "seconds") == {"seconds": 30.0, "p10": pytest.approx(14.0), "p90": pytest.approx(46.0)}


def test_table_has_one_part_for_each_set_of_columns():
    rows = [
        {"benchmark": "speed", "arm": "ours", "tokens": 12345.6},
        {"benchmark": "speed", "arm": "theirs", "tokens": 7.0},
        {"benchmark": "memory", "arm": "ours", "bytes": 3},
    ]
    speed, memory = table(rows).split("\n\n")
    assert speed.splitlines() == ["speed", "arm     tokens", "------  ------", "ours    12,346", "theirs       7"]
    assert memory.splitlines()[-1] == "ours      3"


def test_json_holds_the_machine_and_every_digit(tmp_path):
    rows = [{"benchmark": "speed", "seconds": 0.1234567890123}]
    write_json(tmp_path / "figures.json", rows)
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["rows"] == rows
    assert written["machine"]["threads"] >= 1
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
