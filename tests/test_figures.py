"""What all pictures share: whole files or none, and errors before the work."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv3.errors import UserError
from dsv3.figures import amount, check_picture, figure

pytest.importorskip("matplotlib")


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf", ".PNG"])
def test_a_picture_appears_whole(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"picture{suffix}"
    with figure(path, 3, 2) as canvas:
        canvas.subplots().plot([1, 2])
        assert not path.exists()
    assert path.stat().st_size > 1000 and list(tmp_path.iterdir()) == [path]


def test_drawing_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), figure(tmp_path / "picture.png", 3, 2):
        1 / 0  # noqa: B018
    assert not list(tmp_path.iterdir())


def test_the_style_is_left_as_it_was(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    with figure(tmp_path / "picture.png", 3, 2):
        assert matplotlib.rcParams["axes.spines.top"] is False
    assert dict(matplotlib.rcParams) == before


def test_what_cannot_be_a_picture_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"picture\.jpg .*\.png, \.svg, \.pdf"):
        check_picture(tmp_path / "picture.jpg")
    with pytest.raises(UserError, match="no folder"):
        check_picture(tmp_path / "none" / "picture.png")
    (tmp_path / "taken.png").mkdir()
    with (
        pytest.raises(UserError, match="cannot be written"),
        figure(tmp_path / "taken.png", 3, 2),
    ):
        pass


@pytest.mark.parametrize(
    ("n", "said"),
    [(0, "0"), (512, "512"), (8192, "8.19K"), (45e6, "45M"), (469e9, "469B"), (14.8e12, "14.8T")],
)
def test_amounts(n: float, said: str) -> None:
    assert amount(n) == said
