"""The figure is a picture with a point for each arm."""

from pathlib import Path

from comparisons import RESULTS
from PIL import Image

from megatron_step.compare.figure import draw


def test_the_figure_is_a_picture(tmp_path: Path) -> None:
    draw(RESULTS, tmp_path / "new/comparison.png")
    with Image.open(tmp_path / "new/comparison.png") as picture:
        assert picture.size == (1650, 675)
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 10
