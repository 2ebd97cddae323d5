"""Figures of matplotlib as elements of an HTML page, or as PNG.

On the page a plot takes the page's text colour and font, its styles are classes of the page's one
style sheet (a policy without 'unsafe-inline' then allows them), and it has no identifier that
another plot has.
"""

import html
import io
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from lillama.errors import InputError

__all__ = [
    "AFTER",
    "BEFORE",
    "INK",
    "WIDTH",
    "Plot",
    "Stylesheet",
    "as_png",
    "as_svg",
    "check_matplotlib",
    "colour_of",
    "plot_style",
]

WIDTH = 5.4  # inches; 389 units of SVG, near a phone's width, so that letters keep their size there
BEFORE, AFTER = "#8b8f98", "#3f83f0"

# stands for the page's text colour, and for black in a PNG
INK = "#010203"


def check_matplotlib() -> None:
    """Raises InputError where the extra is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise InputError(
            "the report's plots need matplotlib, which is not installed: "
            "pip install 'lillama[report]'"
        ) from error


@dataclass(frozen=True, slots=True)
class Plot:
    """A figure with what a reader who does not see it is told. `key` names it in files and ids."""

    key: str
    title: str
    description: str
    figure: Any


@dataclass(slots=True)
class Stylesheet:
    """The styles of all plots of a page, each a class."""

    classes: dict[str, str] = field(default_factory=dict)

    def name(self, style: str) -> str:
        """The class of a `style` attribute; fonts are the page's, black is its text colour."""
        style = re.sub(r"font: (?:[a-z]+ )*([\d.]+px)[^;]*", r"font-size: \1", style)
        style = style.replace(INK, "currentColor").strip("; ")
        return self.classes.setdefault(style, f"p{len(self.classes)}")

    @property
    def css(self) -> str:
        rules = [f".{name}{{{style}}}" for style, name in self.classes.items()]
        return "\n".join(["svg *{stroke-linejoin:round;stroke-linecap:butt}", *rules])


def plot_style() -> AbstractContextManager[None]:
    """matplotlib's settings, for drawing and for saving."""
    from matplotlib import rc_context, rcParamsDefault

    ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    # a matplotlibrc of the user changes nothing
    defaults = {k: v for k, v in rcParamsDefault.items() if not k.startswith("backend")}
    settings: dict[Any, Any] = {
        **defaults,
        **dict.fromkeys(ink, INK),
        "font.size": 10.0,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": INK,
        "grid.alpha": 0.15,
        "legend.frameon": False,
        "legend.fontsize": 9.0,
        "text.parse_math": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "lillama",
        "figure.constrained_layout.use": True,
    }
    return rc_context(settings)


def colour_of(value: float) -> Any:
    """0 to 1 as a colour (RGBA) that shows on white and on black."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.15 + 0.8 * min(1.0, value))


def as_svg(plot: Plot, styles: Stylesheet) -> str:
    """An <svg> element to stand in a page, named by its title and description."""
    stream = io.StringIO()
    with plot_style():
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        plot.figure.savefig(stream, format="svg", transparent=True, metadata=metadata)
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    opening = re.search(r'<svg[^>]*viewBox="([^"]*)"[^>]*>', text)
    assert opening is not None
    body = text[opening.end() :].replace("xlink:href", "href")
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', body))
    names = {name for pair in used for name in pair if name}

    def identifier(match: re.Match[str]) -> str:
        return f' id="{plot.key}-{match[1]}"' if match[1] in names else ""

    body = re.sub(r' id="([^"]*)"', identifier, body)
    body = re.sub(r'(href="#|url\(#)', rf"\1{plot.key}-", body)
    body = re.sub(
        r' style="([^"]*)"', lambda m: f' class="{styles.name(html.unescape(m[1]))}"', body
    )
    ids = f"{plot.key}-title", f"{plot.key}-desc"
    return (
        f'<svg role="img" aria-labelledby="{ids[0]} {ids[1]}" viewBox="{opening[1]}">'
        f'<title id="{ids[0]}">{html.escape(plot.title)}</title>'
        f'<desc id="{ids[1]}">{html.escape(plot.description)}</desc>{body.strip()}'
    )


def as_png(plot: Plot) -> bytes:
    stream = io.BytesIO()
    with plot_style():
        plot.figure.savefig(stream, format="png", dpi=200, facecolor="white")
    return stream.getvalue()
