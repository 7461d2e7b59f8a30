"""A report as Markdown and as a page that needs nothing from elsewhere."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from ds_zoadamu.benchmark.blocks import Bullets, Chart, Charts, Code, Heading, Series, Table, Text, markdown
from ds_zoadamu.benchmark.charts import _ticks, svg
from ds_zoadamu.benchmark.page import page

CHART = Chart(
    "accuracy <dev>",
    "steps",
    [Series("a & b", 0, [(0, 0.5, 0.5, 0.5), (5, 0.75, 0.5, 1.0), (10, 1.0, 1.0, 1.0)]), Series("c", 7, [(0, 0.5, 0.5, 0.5)])],
    level=("chance", 0.5),
)
BLOCKS = [
    Heading("A report", 1),
    Text("With **strong** and `code`, 1 < 2."),
    Bullets(["one", "two"]),
    Table(("", "x", "why"), [("a|b", 1.5, "<script>alert(1)</script>"), ("c", "2.0 ± 0.1 (3.0)", "")]),
    Charts("Curves", [CHART, Chart("empty", "steps", [])]),
    Code("command --x <y>"),
]


def test_markdown_has_everything_but_the_charts():
    assert markdown(BLOCKS) == (
        "# A report\n\nWith **strong** and `code`, 1 < 2.\n\n- one\n- two\n\n"
        "|  | x | why |\n| --- | --- | --- |\n| a\\|b | 1.5 | <script>alert(1)</script> |\n| c | 2.0 ± 0.1 (3.0) |  |\n\n"
        "    command --x <y>\n"
    )


class Tags(HTMLParser):
    """What is open, and which elements there are."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.attributes = [], [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.attributes += attributes
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_stands_alone():
    text = page(BLOCKS)
    tags = Tags()
    tags.feed(text)
    assert tags.open == [] and text.startswith("<!doctype html>")
    assert not {"script", "link", "img", "iframe", "object", "style src"} & set(tags.seen)
    assert not {"src", "href", "srcset"} & {name for name, _ in tags.attributes}
    assert not re.search(r"url\(|@import|https?:", text)
    assert "prefers-color-scheme:dark" in text and "width=device-width" in text and "<title>A report</title>" in text
    assert (
        "&lt;script&gt;alert(1)&lt;/script&gt;" in text and "<strong>strong</strong> and <code>code</code>, 1 &lt; 2." in text
    )
    assert text.count('<svg viewBox="0 0 400 240"') == 1  # a chart without lines is left out
    # Numbers stand to the right: both cells of the second column, none of the third.
    assert text.count("<td class=n>") == 2 and "<th class=n>x</th>" in text


def test_a_chart_puts_points_where_they_belong():
    root = ElementTree.fromstring(svg(CHART))
    (line, single), (band, _) = root.findall("polyline"), root.findall("polygon")
    points = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
    # x: 0 to 10 between 52 and 388; y: the ticks 0.4 to 1 between 204 and 10, so 0.5 is at 204 - 194 / 6.
    assert points == [(52.0, 171.7), (220.0, 90.8), (388.0, 10.0)]
    assert band.get("points").split()[1] == "220.0,10.0" and band.get("points").split()[4] == "220.0,171.7"
    assert single.get("stroke") == "var(--c1)" and single.get("stroke-dasharray") and not line.get("stroke-dasharray")
    texts = [element.text for element in root.findall("text")]
    assert texts[-1] == "steps" and {"0", "5", "10", "0.4", "0.6", "0.8", "1"} <= set(texts)
    assert [title.text for title in root.iter("title")][:2] == ["chance: 0.5", "a & b: 0.5 at 0"]


@pytest.mark.parametrize(
    "values, ticks",
    [
        ([0, 10], [0, 5, 10]),
        ([0, 20_000], [0, 5_000, 10_000, 15_000, 20_000]),
        ([3, 3], [2.6, 2.8, 3.0, 3.2, 3.4]),
        ([0], [-0.1, -0.05, 0.0, 0.05, 0.1]),
        ([-1, 1], [-1.0, -0.5, 0.0, 0.5, 1.0]),
    ],
)
def test_ticks_are_round_numbers_around_the_values(values, ticks):
    assert _ticks(values) == pytest.approx(ticks)  # 3 * 0.1 is not the float 0.3
