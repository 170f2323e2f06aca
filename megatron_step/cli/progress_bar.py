"""The progress bar of the commands that read or write large files."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def progress_bar(unit: str, is_hidden: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on a terminal during the block, and give the block a function that updates it.

    The function takes the units done so far and the total units. `unit` "B" shows bytes.
    """
    with tqdm(unit=unit, unit_scale=unit == "B", disable=True if is_hidden else None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
