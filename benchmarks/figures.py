"""Plots for the docs, drawn twice: for a light page and for a dark one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

FIGURES = Path(__file__).parent.parent / "docs" / "figures"
# Okabe and Ito's colours, which the colour-blind can tell apart, where they show on white and black.
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#999999"]
INK = {"light": "#1f2328", "dark": "#d1d7e0"}
FAINT = {"light": "#d1d9e0", "dark": "#3d444d"}


def save(
    name: str, draw: Callable[..., None], size: tuple[float, float], shape: tuple[int, int] = (1, 1)
) -> None:
    """Write docs/figures/<name>-light.svg and <name>-dark.svg.

    `draw` gets the axes (an array of rows x columns where `shape` is not 1 x 1). `size` in inches
    of 72 points. Neither a date nor a random id is written: the same numbers are the same file.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    for theme in INK:
        with pyplot.rc_context(style(theme)):
            figure, axes = pyplot.subplots(*shape, figsize=size, layout="constrained")
            draw(axes)
            where = FIGURES / f"{name}-{theme}.svg"
            where.parent.mkdir(exist_ok=True)
            figure.savefig(where, transparent=True, metadata={"Date": None})
            pyplot.close(figure)


def style(theme: str) -> dict[str, Any]:
    ink, faint = INK[theme], FAINT[theme]
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "minilora",
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": faint,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": faint,
        "grid.linewidth": 0.6,
        "xtick.color": ink,
        "ytick.color": ink,
        "legend.frameon": False,
        "lines.linewidth": 1.6,
    }
