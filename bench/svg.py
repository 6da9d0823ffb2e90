"""What all plots of the pages share. Matplotlib is imported when the first one is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def pyplot() -> Any:
    """matplotlib.pyplot, set up so that the same figures give the same file."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "pystage"
    from matplotlib import pyplot as plt

    return plt


def plain(axis: Any) -> None:
    """No frame, small text."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.title.set_fontsize(9)
    axis.tick_params(labelsize=7)


def save(figure: Any, path: Path) -> None:
    """Writes the SVG, without a date, and closes the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot().close(figure)
