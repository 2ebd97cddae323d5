"""A figure of matplotlib as an element of an HTML page, or as PNG. On the page it takes the page's
text colour and font, and has no identifier that another plot has."""

import html
import io
import re
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from lillama.errors import InputError

__all__ = ["INK", "Plot", "as_png", "as_svg", "check_matplotlib", "plot_style"]

# stands for the page's text colour, and for black in a PNG
INK = "#010203"


class Plot(NamedTuple):
    """`key` names it in files and ids."""

    key: str
    title: str
    figure: Any


def check_matplotlib() -> None:
    """Raises InputError where the extra is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise InputError(
            "the report's plots need matplotlib, which is not installed: "
            "pip install 'lillama[report]'"
        ) from error


def plot_style() -> AbstractContextManager[None]:
    """Return matplotlib's settings, for drawing and saving; the user's matplotlibrc is ignored."""
    from matplotlib import rc_context, rcParamsDefault

    inks = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    settings: dict[Any, Any] = {
        **{k: v for k, v in rcParamsDefault.items() if not k.startswith("backend")},
        **dict.fromkeys((*inks, "grid.color"), INK),
        **{"font.size": 10.0, "legend.fontsize": 9.0, "legend.frameon": False, "grid.alpha": 0.15},
        **{"axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False},
        **{"svg.fonttype": "none", "svg.hashsalt": "lillama", "axes.axisbelow": True},
        "figure.constrained_layout.use": True,
    }
    return rc_context(settings)


def as_svg(plot: Plot) -> str:
    """Return an <svg> element to stand in a page, named by its title."""
    stream = io.StringIO()
    with plot_style():
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        plot.figure.savefig(stream, format="svg", transparent=True, metadata=metadata)
    text = re.sub(r"(?s)<metadata>.*?</metadata>|<style.*?</style>", "", stream.getvalue())
    opening = re.search(r'<svg[^>]*viewBox="([^"]*)"[^>]*>', text)
    assert opening is not None
    body = text[opening.end() :].replace("xlink:href", "href").replace(INK, "currentColor")
    body = re.sub(r'font: (?:[a-z]+ )*([\d.]+px)[^;"]*', r"font-size: \1", body)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', body))
    body = re.sub(
        r' id="([^"]*)"', lambda m: f' id="{plot.key}-{m[1]}"' if m[1] in used else "", body
    )
    body = re.sub(r'(href="#|url\(#)', rf"\1{plot.key}-", body)
    name, about = f"{plot.key}-title", f"{plot.key}-desc"
    return (
        f'<svg role="img" aria-labelledby="{name} {about}" viewBox="{opening[1]}">'
        f'<title id="{name}">{html.escape(plot.title)}</title>'
        f'<desc id="{about}">The table of this section has the figures.</desc>{body.strip()}'
    )


def as_png(plot: Plot) -> bytes:
    stream = io.BytesIO()
    with plot_style():
        plot.figure.savefig(stream, format="png", dpi=200, facecolor="white")
    return stream.getvalue()
