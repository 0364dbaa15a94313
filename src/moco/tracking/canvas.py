"""Figures of matplotlib that look the same whatever the environment says, with names shown as they are.

A notebook's MPLBACKEND, a matplotlibrc in the current folder and the user's style do not reach them, and a class name
is text: `$` begins no formula, and one that is long is cut.
"""

from __future__ import annotations

import os
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moco.errors import one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LONGEST = 24  # characters of a name that is drawn
INVISIBLE = ("Cc", "Cf", "Cs")  # categories of characters that move or hide others: controls, directions, surrogates


@contextmanager
def plain_style() -> Iterator[None]:
    """Use Matplotlib's own settings, without formulas in texts, while a figure is made or saved."""
    os.environ["MPLBACKEND"] = "Agg"  # read at the import, which fails where a notebook's backend is not installed
    os.environ.pop("MATPLOTLIBRC", None)
    import matplotlib as mpl

    with mpl.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a character that no font has: a box stands for it
        mpl.rcParams.update({**mpl.rcParamsDefault, "backend": "Agg", "text.parse_math": False, "text.usetex": False})
        yield


def writer(draw: Callable[[], Figure]) -> Callable[[Any], None]:
    """Return what writes the figure that `draw` makes as a PNG to a path."""

    def write(path: Any) -> None:
        with plain_style():
            from matplotlib.backends.backend_agg import FigureCanvasAgg

            figure = draw()
            FigureCanvasAgg(figure).print_figure(path, format="png", dpi=110)

    return write


def shown(name: str, longest: int = LONGEST) -> str:
    """Return a name as a picture can hold it: one line, without characters that move others, cut in its middle."""
    visible = "".join(c for c in name if unicodedata.category(c) not in INVISIBLE or c in "\n\t\r")
    text = one_line(" ".join(visible.split())) or "(blank)"
    if len(text) > longest:
        half = (longest - 1) // 2
        text = f"{text[: longest - 1 - half]}…{text[-half:]}" if half else text[:longest]
    return text
