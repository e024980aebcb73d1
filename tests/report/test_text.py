"""Numbers and text in reports: halves up, and names of any characters printed as they are, on DVC's own page too."""

import json
import math
import re
import subprocess
import sys
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pandas as pd
import pytest

from milan.report import drawing, heat, plots
from milan.report.text import (
    Markdown,
    decimal,
    in_latex,
    in_markdown,
    links_in_html,
    links_in_markdown,
    markdown_link,
    markdown_table,
)
from milan.stage import Stage

markdown_it = pytest.importorskip("markdown_it", reason="markdown-it-py, which rich brings, is not installed")
NAMES = [
    "$", "$$", "$x_1$", "a|b", "\\", r"\|", r"a\alpha", "{0}", "^2", "~x~", "~~x~~", "*x*", "_x_", "__x__", "a_b_c", "a__b", "`x`", "[x](y)",
    "![x](y)", "<b>", "</script><script>x()</script>", "<!-- x", "a < b", "&amp;", "&#36;", "AT&T", "#x", "100 %", "<https://x.org>",
]  # fmt: skip


@pytest.mark.parametrize(
    "value, digits, text",
    [
        (5.35, 1, "5.4"),
        (11.75, 1, "11.8"),
        (0.05, 1, "0.1"),
        (-0.25, 1, "-0.3"),
        (5.3499, 1, "5.3"),
        (2.675, 2, "2.68"),
        (0.5, 0, "1"),
        (1.5, 0, "2"),
        (1e22, 1, "10000000000000000000000.0"),
        (7, 1, "7.0"),
        (math.nan, 1, "–"),
        (-math.inf, 1, "–"),
    ],
)
def test_halves_are_rounded_away_from_zero(value, digits, text):
    assert decimal(value, digits) == text


def test_a_sign_on_request():
    assert [decimal(value, 2, sign=True) for value in (0.125, -0.125, 0, math.nan)] == ["+0.13", "-0.13", "+0.00", "–"]


class Texts(HTMLParser):
    """Collect the texts of the cells and items of HTML, and the links."""

    def __init__(self, html: str):
        super().__init__()
        self.texts, self.links, self.inside = [], [], False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        if tag in ("td", "th", "li"):
            self.texts.append("")
            self.inside = True
        else:
            assert tag in ("table", "thead", "tbody", "tr", "ul", "a"), f"<{tag}> came out of a text"
            self.links += [dict(attributes)["href"]] if tag == "a" else []

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th", "li")

    def handle_data(self, data):
        if self.inside:
            self.texts[-1] += data


def html(text: str) -> Texts:
    """Render Markdown as GitHub does: with HTML, tables and strikethrough."""
    return Texts(markdown_it.MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(text))


def test_names_in_markdown_print_as_they_are():
    """In a table, as a cell and as a title, and in a list, where a # would make a heading of its item but for a word before it."""
    table = html(markdown_table([{name: name for name in NAMES}]))
    assert table.texts == NAMES * 2 and table.links == []
    items = html("\n".join(f"- of {in_markdown(name)}" for name in NAMES))
    assert items.texts == [f"of {name}" for name in NAMES] and items.links == []


def test_lines_become_one_and_plain_words_stay():
    assert in_markdown("a\nb\r\n| c") == r"a b \| c"
    for text in ("CLIP target, prompting decoder", "36.0 (35.0–37.0)", "clip_target", "no pretraining < MAE", "+3.00", "-0.48 to +4.48"):
        assert in_markdown(text) == text
    assert in_markdown(Markdown("[x](y)")) == "[x](y)"


def test_links_keep_odd_paths_and_texts():
    odd = html(f"- {markdown_link('a]b|c', 'outs/a b/(x)|<y>.csv')}")
    assert odd.texts == ["a]b|c"] and odd.links == ["outs/a%20b/%28x%29%7C%3Cy%3E.csv"]
    source = html(f"- {links_in_markdown('see *A|B* https://x.org/a_(b)?c=1&d=2; <i>')}")
    assert source.texts == ["see *A|B* x.org; <i>"] and source.links == ["https://x.org/a_%28b%29?c=1&d=2"]
    page = links_in_html('<i> https://x.org/a?b=1&c="2; end')
    assert page == '&lt;i&gt; <a href="https://x.org/a?b=1&amp;c=&#34;2">x.org</a>; end'


def test_names_in_latex_print_as_they_are():
    assert in_latex(r"\{x}^2~_$|<>&%#") == (
        r"\textbackslash{}\{x\}\textasciicircum{}2\textasciitilde{}\_\$\textbar{}\textless{}\textgreater{}\&\%\#"
    )
    assert in_latex("[1] *x*\n`y` – z") == r"{[}1{]} {*}x{*} \textasciigrave{}y\textasciigrave{} -- z"


def test_names_are_drawn_as_they_are(tmp_path):
    """A formula that does not parse would stop the drawing; one that does would be drawn as something else."""
    names = [*NAMES, "_hidden", "$\\frac$"]
    figure, axes = drawing.picture_grid(names[-1:], 3)
    for axis, name in zip(axes[0], ("$", "$$$", "$^x$"), strict=True):
        heat.set_title(axis, name)
    drawing.add_legend(figure, dict(zip(names, drawing.class_colours(len(names)), strict=False)))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == names
    assert not any(text.get_parse_math() for text in figure.findobj(plots.plt.Text))
    plots.save(figure, tmp_path / "names.png")


class Scripts(HTMLParser):
    """Collect the scripts of a page, as a browser would run them."""

    def __init__(self, html: str):
        super().__init__()
        self.scripts = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.cdata_elem == "script":
            self.scripts[-1] += data


def test_a_class_s_name_does_not_run_on_dvc_s_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [*NAMES, "<!--<script>", "<SCRIPT >y()</SCRIPT >", "<DVC_METRIC_DATA>"]
    stage = mock.Mock(args=SimpleNamespace(confusion=Path("confusion.csv")))
    stage.write_csv = partial(Stage.write_csv, stage)
    Stage.write_confusion(stage, [(name, "plain") for name in names])
    rows = pd.read_csv("confusion.csv")
    shown = [name.replace("\u200b", "") for name in rows["actual"]]
    assert shown == names and set(rows["predicted"]) == {"plain"}
    assert (rows["actual"] != names).sum() == sum(bool(re.search(r"<[a-zA-Z/!]", name)) for name in names)
    plot = {"plots": [{"confusion.csv": {"template": "confusion", "x": "actual", "y": "predicted"}}]}
    Path("dvc.yaml").write_text(json.dumps(plot))
    Path(".dvc").mkdir()
    Path(".dvc/config").write_text("[core]\n    no_scm = true\n")
    subprocess.run([sys.executable, "-m", "dvc", "plots", "show", "-q", "--out", "page"], check=True, capture_output=True)
    scripts = [script for script in Scripts(Path("page/index.html").read_text()).scripts if script.strip()]
    assert len(scripts) == 1, "a name has ended the script"
    spec = json.loads(re.search(r"var spec = (.*);\n", scripts[0])[1])
    assert [row["actual"].replace("\u200b", "") for row in spec["data"]["values"]] == names
