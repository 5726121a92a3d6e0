"""HTML that what it shows cannot break: text is escaped unless it is `Markup`. Tables, bars and pictures for a page.

A page of these parts fetches nothing and runs nothing: its policy forbids both. Pictures are SVG inside the page, whose
lines and letters take their colours from the style sheet, so that one picture serves day, night and paper.
"""

import html
import io
import re
from collections.abc import Collection, Sequence
from importlib.resources import files

from matplotlib import rc_context
from matplotlib.figure import Figure

from hqlt_dashboards.drawing import GRID_COLOUR, LINE_COLOUR, QUIET_COLOUR

REM_AN_INCH = 5.0  # the least width of a picture; on a narrower screen it scrolls in its frame
_COLOURS = {
    "#000000": "currentColor",
    LINE_COLOUR: "var(--line)",
    GRID_COLOUR: "var(--grid)",
    QUIET_COLOUR: "var(--quiet)",
}
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Markup(str):
    """HTML that stands as it is; any other text is escaped on its way into a page."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: str) -> Markup:
    """An element. An attribute's underscores are hyphens, and one at its end goes.

    >>> tag("a", "1 < 2 & ", tag("b", "3"), href="#x", class_="y")
    '<a href="#x" class="y">1 &lt; 2 &amp; <b>3</b></a>'
    """
    written = (f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"' for key, value in attributes.items())
    return Markup(f"<{name}{''.join(written)}>{join(*children)}</{name}>")


def join(*parts: str) -> Markup:
    return Markup("".join(part if isinstance(part, Markup) else html.escape(part) for part in parts))


def paragraph(sentences: Sequence[str]) -> Markup:
    return tag("p", " ".join(sentences)) if sentences else Markup()


def bullets(lines: Sequence[str]) -> Markup:
    return tag("ul", *(tag("li", line) for line in lines)) if lines else Markup()


def terms(pairs: Sequence[tuple[str, str]]) -> Markup:
    """Words and what they stand for."""
    return tag("dl", *(tag("div", tag("dt", word), tag("dd", meaning)) for word, meaning in pairs))


def table(caption: str, titles: Sequence[str], rows: Sequence[Sequence[str]], *, words: Collection[int] = ()) -> Markup:
    """A table whose first cell names each row; the columns `words` are words too, the others numbers.

    One that is too wide scrolls in its frame, by keyboard too.
    """
    sorts = ["word" if column == 0 or column in words else "number" for column in range(len(titles))]
    head = [tag("th", title, scope="col", class_=sort) for title, sort in zip(titles, sorts, strict=True)]
    body = []
    for name, *cells in rows:
        others = [tag("td", cell, class_=sort) for cell, sort in zip(cells, sorts[1:], strict=True)]
        body.append(tag("tr", tag("th", name, scope="row"), *others))
    whole = tag("table", tag("caption", caption), tag("thead", tag("tr", *head)), tag("tbody", *body))
    return tag("div", whole, class_="frame", role="region", aria_label=caption, tabindex="0")


def bar(share: float, limit: float) -> Markup:
    """A bar of `share` of its width, with a stroke at `limit`; both from 0 to 1. Decoration: the numbers stand by."""
    drawn = (
        f'<rect class="{"bar" if share > limit else "low bar"}" width="{100 * share:.1f}" height="10"/>'
        f'<line class="stroke" x1="{100 * limit:.1f}" x2="{100 * limit:.1f}" y2="10"/>'
    )
    return _strip(drawn)


def interval(low: float, middle: float, high: float, reach: float) -> Markup:
    """An interval and its middle on a scale from -`reach` to `reach`, with a stroke at 0. Decoration, as above."""
    left, dot, right = (50 + 48 * value / reach if reach else 50.0 for value in (low, middle, high))
    drawn = (
        '<line class="stroke" x1="50" x2="50" y2="10"/>'
        f'<line class="span" x1="{left:.1f}" x2="{right:.1f}" y1="5" y2="5"/>'
        f'<rect class="bar" x="{dot - 1:.1f}" y="1.5" width="2" height="7"/>'
    )
    return _strip(drawn)


def _strip(drawn: str) -> Markup:
    frame = 'class="strip" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true"'
    return Markup(f"<svg {frame}>{drawn}</svg>")


def picture(figure: Figure, description: str) -> Markup:
    """`figure` as SVG, its text as text, with `description` as its caption and for readers who do not see it."""
    content = io.BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "hqlt"}):  # the salt: equal figures, equal files
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
    svg = content.getvalue().decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"#([\w-]+)[\")]", svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r"#[0-9a-f]{6}", lambda found: _COLOURS.get(found[0], found[0]), svg)
    least = f"min-width: {REM_AN_INCH * figure.get_figwidth():.0f}rem"
    opening = f'<svg role="img" aria-label="{html.escape(description)}" style="{least}" '
    svg = opening + re.sub(r'(width|height)="[\d.]+pt" ', "", svg.removeprefix("<svg "), count=2)
    frame = tag("div", Markup(svg), class_="frame", tabindex="0", role="region", aria_label="picture")
    return tag("figure", frame, tag("figcaption", description))


def page(title: str, *parts: Markup) -> str:
    """A whole page of `parts`, self-contained: no script, nothing fetched."""
    style = Markup(files("hqlt_dashboards").joinpath("page.css").read_text(encoding="utf-8"))
    head = [
        Markup('<meta charset="utf-8">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup('<meta name="color-scheme" content="light dark">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        tag("title", title),
        tag("style", style),
    ]
    body = tag("body", tag("main", *parts))
    return f'<!doctype html>\n<html lang="en">{tag("head", *head)}\n{body}</html>\n'
