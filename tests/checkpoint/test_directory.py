from pathlib import Path

import pytest

from megatron_step.checkpoint import directory


def make(folder: Path, *steps: int) -> None:
    for step in steps:
        path = folder / directory.checkpoint_name(step)
        path.mkdir(parents=True)
        (path / "file").write_text(str(step))


def steps(folder: Path) -> list[int]:
    return [step for step, _ in directory.list_checkpoints(folder)]


def test_only_finished_checkpoints_are_listed_oldest_first(tmp_path: Path) -> None:
    assert directory.list_checkpoints(tmp_path / "none") == []
    make(tmp_path, 200, 5, 123456789)
    directory.make_partial(tmp_path, 300)
    (tmp_path / "step_00000007").write_text("a file")
    (tmp_path / "step_12").mkdir()
    (tmp_path / "step_00000008_copy").mkdir()
    assert steps(tmp_path) == [5, 200, 123456789]


def test_published_checkpoint_has_its_name_and_files(tmp_path: Path) -> None:
    partial = directory.make_partial(tmp_path / "checkpoints", 40)
    (partial / "file").write_text("content")
    final = directory.publish(partial, 40)
    assert final == tmp_path / "checkpoints" / "step_00000040"
    assert (final / "file").read_text() == "content"
    assert list(final.parent.iterdir()) == [final]


def test_publishing_a_step_again_replaces_it(tmp_path: Path) -> None:
    make(tmp_path, 40)
    partial = directory.make_partial(tmp_path, 40)
    (partial / "other").write_text("content")
    final = directory.publish(partial, 40)
    assert [path.name for path in final.iterdir()] == ["other"]
    assert list(tmp_path.iterdir()) == [final]


def test_leftovers_of_crashes_are_removed_and_nothing_else(tmp_path: Path) -> None:
    make(tmp_path, 40)
    (directory.make_partial(tmp_path, 50) / "file").write_text("half")
    (tmp_path / "notes.txt").write_text("mine")
    directory.remove_partial(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "step_00000040"]
    directory.remove_partial(tmp_path / "none")


@pytest.mark.parametrize(
    ("keep", "keep_every", "kept"),
    [
        (0, 0, [10, 20, 30, 40, 50, 60]),
        (1, 0, [60]),
        (2, 0, [50, 60]),
        (2, 20, [20, 40, 50, 60]),
        (1, 30, [30, 60]),
        (9, 0, [10, 20, 30, 40, 50, 60]),
    ],
)
def test_prune_keeps_the_newest_and_every_nth(tmp_path: Path, keep: int, keep_every: int, kept: list[int]) -> None:
    make(tmp_path, 10, 20, 30, 40, 50, 60)
    removed = directory.prune(tmp_path, 60, keep, keep_every)
    assert steps(tmp_path) == kept
    assert [path.name for path in removed] == [
        directory.checkpoint_name(step) for step in (10, 20, 30, 40, 50, 60) if step not in kept
    ]
    assert len(list(tmp_path.iterdir())) == len(kept)


def test_prune_never_gives_up_the_step_just_saved_for_a_later_one(tmp_path: Path) -> None:
    """Later checkpoints are there when a run went back, because they are damaged or by its user's wish."""
    make(tmp_path, 10, 20, 90)
    directory.prune(tmp_path, 20, keep=1, keep_every=0)
    assert steps(tmp_path) == [20, 90]


def test_later_checkpoints_are_kept_but_no_longer_counted_when_set_aside(tmp_path: Path) -> None:
    make(tmp_path, 10, 20, 30)
    moved = directory.set_aside(tmp_path, 10)
    assert steps(tmp_path) == [10]
    assert len(moved) == 2 and all(path.is_dir() for path in moved)
    make(tmp_path, 20)
    assert len(directory.set_aside(tmp_path, 10)) == 1  # a second history of the same steps
    directory.remove_partial(tmp_path)
    directory.prune(tmp_path, 10, keep=1, keep_every=0)
    assert len(list(tmp_path.iterdir())) == 4
