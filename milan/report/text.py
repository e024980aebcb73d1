r"""Write numbers and text as they are, in Markdown, LaTeX and HTML.

Text from files (names of variants, classes and methods, sources, keys) may hold any character. It is escaped here for
Markdown and LaTeX; page.html's template escapes for HTML, and in figures matplotlib draws it as it is (STYLE in plots.py).
"""

import math
import re
from collections.abc import Callable
from decimal import ROUND_HALF_UP, Context, Decimal
from urllib.parse import quote

from markupsafe import Markup

DASH = "–"
URL = re.compile(r"(https?://[^\s;,]+)")
OF_URLS = "%/:?#[]@!$&'*+,;=~"  # may stand in a URL; the rest is encoded
MARKUP = re.compile(  # characters that Markdown (GitHub's) does not print, where it does not
    r"[\\`*\[\]|~$]"
    r"|<(?=[A-Za-z/!?])|&(?=#?\w+;)"  # HTML
    r"|(?<![^\W_])_|_(?![^\W_])"  # emphasis
)
IN_LATEX = str.maketrans(
    {character: rf"\{character}" for character in "%&_#${}"}
    | {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "`": r"\textasciigrave{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
    | {"[": "{[}", "]": "{]}", "*": "{*}"}  # \\ at the end of a row above takes these as its arguments
    | {"\n": " ", "\r": " ", DASH: "--"}
)


def decimal(value: float, digits: int = 1, sign: bool = False) -> str:
    """Return a number rounded to so many decimals, halves away from zero (5.35 is 5.4); a dash for NaN and infinity.

    The number's shortest decimal form is rounded, not the binary number next to it. sign: write + before positive numbers."""
    value = float(value)
    if not math.isfinite(value):
        return DASH
    step = Decimal(1).scaleb(-digits)
    rounded = Decimal(repr(value)).quantize(step, ROUND_HALF_UP, Context(prec=400))  # a float has up to 309 digits
    return f"{rounded:+f}" if sign else f"{rounded:f}"


class Markdown(str):
    """Text that is Markdown already: in_markdown returns it unchanged."""


def in_markdown(text: str) -> Markdown:
    """Return text on one line of Markdown, also of a table, that prints as the text."""
    return text if isinstance(text, Markdown) else Markdown(MARKUP.sub(r"\\\g<0>", " ".join(text.splitlines())))


def markdown_link(text: str, target: str) -> Markdown:
    """Return a link to a URL or a relative path."""
    return Markdown(f"[{in_markdown(text)}]({quote(target, safe=OF_URLS)})")


def markdown_table(rows: list[dict[str, str]]) -> str:
    """Return rows {title: cell} as a table in Markdown."""
    lines = [list(rows[0]), [Markdown("---")] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(map(in_markdown, cells))} |" for cells in lines)


def aligned(rows: list[list[str]], left: int | None = None) -> str:
    """Return rows of cells as text in columns: the first `left` at the left (None: all), the others at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [str.ljust if left is None or column < left else str.rjust for column in range(len(widths))]
    return "\n".join("  ".join(side(*cell) for side, *cell in zip(sides, row, widths, strict=True)).rstrip() for row in rows)


def in_latex(text: str) -> str:
    """Return text as LaTeX that prints it."""
    return text.translate(IN_LATEX)


def links_in_markdown(text: str) -> Markdown:
    """Return a text as Markdown with its URLs as links."""
    return Markdown("".join(each_url(text, in_markdown, lambda url: markdown_link(url.split("/")[2], url))))


def links_in_html(text: str) -> Markup:
    """Return a text as HTML with its URLs as links."""
    link = Markup('<a href="{}">{}</a>').format
    return Markup("").join(each_url(text, str, lambda url: link(url, url.split("/")[2])))


def each_url(text: str, plain: Callable[[str], str], link: Callable[[str], str]) -> list[str]:
    """Return the pieces of a text in their order, each URL given to link and what lies between to plain."""
    return [link(piece) if place % 2 else plain(piece) for place, piece in enumerate(URL.split(text))]
