"""What all pictures share: one look, and one way onto the disk.

A picture here is a plain function of numbers that are in a file as well. It is drawn inside `figure`, which gives an
empty canvas in the house's style and writes it when the block ends:

    with figure(path, 7, 4) as canvas:
        axes = canvas.subplots()
        axes.plot(tokens, loss, color=COLORS[0])

Nothing is drawn through `pyplot`, which keeps a list of open figures and chooses a window system: a training run has
neither. The colours are Okabe and Ito's, which people tell apart whatever cones they have; text is dark grey on
white, grids are faint, frames are left out. matplotlib is imported only when something is drawn.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A7A7A")
INK, FAINT, GRID = "#24292F", "#6B7280", "#E5E7EB"
FORMATS = (".png", ".svg", ".pdf")

STYLE: dict[str, Any] = {
    "figure.dpi": 160,
    "savefig.dpi": 160,
    "figure.facecolor": "white",
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.08,
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Helvetica Neue", "Helvetica", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9CA3AF",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelsize": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "svg.hashsalt": "dsv3",  # the same numbers give the same file
}


def check_picture(path: Path) -> None:
    """Raise UserError now, before hours of work, if no picture could be written there later."""
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"{path} is no picture's name: end it in {', '.join(FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path.parent} is no folder: make it, or name another place for the picture")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("pictures need matplotlib, which is not installed: pip install 'dsv3[train]'")


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A canvas of so many inches, written to `path` when the block ends without an error, whole or not at all.

    Raises UserError where matplotlib is missing, the name is no picture's, or the place cannot be written to.
    """
    check_picture(path)
    import matplotlib
    from matplotlib.figure import Figure

    partial = path.with_name(f".{path.name}.partial")
    style: Any = STYLE  # the stubs list every key there is
    with matplotlib.rc_context(style):
        canvas = Figure(figsize=(width, height), layout="constrained")
        yield canvas
        try:
            canvas.savefig(partial, format=path.suffix[1:].lower(), metadata=_undated(path))
            os.replace(partial, path)
        except OSError as error:
            problem = error.strerror or str(error)
            raise UserError(f"{path} cannot be written ({problem}): name another place") from None
        finally:
            partial.unlink(missing_ok=True)


def _undated(path: Path) -> dict[str, Any]:
    """Metadata without the time of day."""
    return {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}[
        path.suffix.lower()
    ]


def title(axes: Axes, text: str, note: str = "") -> None:
    """Over the topmost axes the picture's name, and in grey what one must know to read it."""
    axes.set_title(text, fontsize=11.5, pad=23 if note else 8)
    axes.annotate(
        note, (0, 1), (0, 8), xycoords="axes fraction", textcoords="offset points", color=FAINT, fontsize=8.5
    )


def amount(n: float) -> str:
    """Tokens as one says them: 512, 45M, 14.8T."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(n) >= 0.99995 * limit:  # what would be rounded to a thousand of the unit below
            return f"{n / limit:.3g}{unit}"
    return f"{n:g}"


def token_axis(axes: Axes, total: float, label: bool = True) -> None:
    """x is tokens, from 0 to `total`."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlim(0, total)
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: amount(n)))
    if label:
        axes.set_xlabel("Tokens")


def end_label(axes: Axes, text: str, y: float, color: str) -> None:
    """A curve's name beside its end, instead of a legend far from it."""
    axes.annotate(
        text,
        (1, y),
        (5, 0),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        va="center",
        color=color,
        fontweight="bold",
        fontsize=8,
        annotation_clip=False,
    )
