"""Results are compared at each arm's best learning rate, paired by seed."""

from pathlib import Path

import pytest
from comparisons import RESULTS

from megatron_step.compare.results import read_results, summaries, table, write_results


def test_an_arm_is_taken_at_the_rate_that_is_best_with_the_first_seed() -> None:
    vanilla, parity = summaries(RESULTS)
    assert [result.perplexity for result in vanilla.results] == [48.0, 52.0]
    assert [result.perplexity for result in parity.results] == [47.04, 52.0]
    assert (vanilla.perplexity, vanilla.spread) == (50.0, pytest.approx(8**0.5))


def test_differences_are_paired_by_seed() -> None:
    vanilla, parity = summaries(RESULTS)
    difference, error = parity.difference(vanilla)
    assert difference == pytest.approx(-0.01), "-2 % with one seed, 0 % with the other"
    assert error == pytest.approx(0.01)
    one_seed = summaries([result for result in RESULTS if result.seed == 1])[1]
    assert one_seed.difference(vanilla) == (pytest.approx(-0.02), None)


def test_the_table_compares_with_the_first_arm() -> None:
    heading, vanilla, parity = (" ".join(line.split()) for line in table(RESULTS).splitlines())
    assert heading == "arm rate seeds perplexity to vanilla model states peak memory FLOPs time"
    assert vanilla.startswith("vanilla 0.002 2 50.00 ± 2.83 180.0 MiB (100%)")
    assert parity.startswith("parity 0.001 2 49.52 ± 3.51 -1.00 ± 1.00 % 81.0 MiB (45%)")
    assert "8.00e+11 (80%)" in parity


def test_results_go_through_their_file(tmp_path: Path) -> None:
    write_results(RESULTS, tmp_path / "results.json")
    assert read_results(tmp_path / "results.json") == RESULTS
    (tmp_path / "other.json").write_text('[{"arm": "x"}]')
    with pytest.raises(ValueError, match="does not hold the results of a comparison"):
        read_results(tmp_path / "other.json")
