"""Helpers that all plots of the pages share. Matplotlib is imported when the first one is drawn.

A page shows a plot about 900 pixels wide. At 9 inches that is 100 pixels per inch, so text of 9
points stays readable. The background is white, so that plots are readable in dark mode.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

WIDTH = 9.0  # inches
SMALL = 9  # points: the smallest text in any plot


def pyplot() -> Any:
    """Returns matplotlib.pyplot, set up so that the same figures give the same file."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update(
        {
            "svg.hashsalt": "pystage",
            "font.size": SMALL,
            "axes.titlesize": 10,
            "axes.labelsize": SMALL,
            "xtick.labelsize": SMALL,
            "ytick.labelsize": SMALL,
            "legend.fontsize": SMALL,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "savefig.facecolor": "white",
        }
    )
    from matplotlib import pyplot as plt

    return plt


def plain(axis: Any) -> None:
    """Removes the frame."""
    axis.spines[["top", "right"]].set_visible(False)


def fit(figure: Any, height: float) -> None:
    """Gives a figure that was drawn elsewhere the width and text size of the others."""
    from matplotlib.text import Text

    figure.set_size_inches(WIDTH, height)
    for axis in figure.axes:
        if axis.get_xscale() == "linear":
            axis.locator_params(axis="x", nbins=4)
    for text in figure.findobj(Text):
        text.set_fontsize(max(text.get_fontsize(), SMALL))


def tell(figure: Any, finding: str, note: str) -> None:
    """Writes what the plot shows above it, and what it was measured on below it."""
    figure.suptitle(textwrap.fill(finding, 84), fontsize=12, x=0.01, ha="left", fontweight="bold")
    text = textwrap.fill(note, 130)
    figure.supxlabel(text, fontsize=SMALL, x=0.01, ha="left", color="#444444")


def save(figure: Any, path: Path) -> None:
    """Writes the SVG, without a date, and closes the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None}, facecolor="white")
    pyplot().close(figure)
