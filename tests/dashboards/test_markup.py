import re
from html.parser import HTMLParser
from importlib.resources import files

from hqlt_dashboards.curves import curves_figure
from hqlt_dashboards.markup import Markup, join, page, picture, table, tag
from hqlt_dashboards.plots import front_figure
from hypothesis import given
from hypothesis import strategies as st


class Reader(HTMLParser):
    """What a browser makes of a page: its elements with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))

    def handle_data(self, data):
        self.text += data


# A carriage return is a line feed to every HTML reader, NUL is none of its characters.
TEXTS = st.text(st.characters(exclude_characters="\r\0", exclude_categories=["Cs"]))


@given(text=TEXTS, attribute=TEXTS)
def test_any_text_comes_back_from_an_element_as_it_was(text, attribute):
    read = Reader(tag("p", text, tag("b", text), title=attribute))
    assert read.elements == [("p", {"title": attribute}), ("b", {})]
    assert read.text == text + text


@given(cells=st.lists(TEXTS, min_size=4, max_size=4), caption=TEXTS)
def test_a_table_has_a_head_a_cell_and_a_row_name_for_everything_whatever_its_texts(cells, caption):
    read = Reader(table(caption, cells[:2], [cells[:2], cells[2:]]))
    names = [name for name, _ in read.elements]
    assert names == ["div", "table", "caption", "thead", "tr", "th", "th", "tbody", *["tr", "th", "td"] * 2]
    assert [a["scope"] for n, a in read.elements if n == "th"] == ["col", "col", "row", "row"]
    assert read.text == caption + "".join(cells[:2] * 2 + cells[2:])


def test_markup_is_not_escaped_twice_and_joining_text_escapes_it():
    assert join("<", Markup("&lt;")) == "&lt;&lt;"


def test_a_picture_refers_only_to_what_is_in_it_and_says_what_it_shows(make_study, make_record):
    results = make_study(*(make_record(i, i / 4, 512.0 * 3**i) for i in range(4)))
    figures = [front_figure(results), curves_figure(results, "train_loss_nats")]
    for figure in figures:
        drawn = picture(figure, 'what "it" <shows>')
        read = Reader(drawn)
        ids = [attributes["id"] for _, attributes in read.elements if "id" in attributes]
        used = [a["xlink:href"] for _, a in read.elements if "xlink:href" in a]
        used += [a["clip-path"].removeprefix("url(").removesuffix(")") for _, a in read.elements if "clip-path" in a]
        assert used
        assert {name.removeprefix("#") for name in used} == set(ids)
        assert len(ids) == len(set(ids))
        (svg,) = (attributes for name, attributes in read.elements if name == "svg")
        assert (svg["role"], svg["aria-label"]) == ("img", 'what "it" <shows>')
        assert "Optimiser step" in read.text or "State (bytes)" in read.text  # text, not outlines of letters
        assert drawn == picture(figure, 'what "it" <shows>')


def test_every_colour_of_a_picture_that_paper_would_lose_at_night_follows_the_style_sheet(make_study, make_record):
    results = make_study(make_record(0, 0.5), make_record(1, 0.6, 2048.0), make_record(2, 0.1, 4096.0))
    for figure in (front_figure(results), curves_figure(results, "train_loss_nats")):
        drawn = picture(figure, "")
        for colour in ("#000000", "#ffffff", "#555555", "#e4e4e4"):
            assert colour not in drawn


def test_a_page_runs_nothing_and_fetches_nothing():
    read = Reader(page("a <b>", tag("p", "x")))
    policy = [a["content"] for n, a in read.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    assert not {"script", "link", "iframe", "object"} & {name for name, _ in read.elements}
    assert "url(" not in read.text
    assert read.text.startswith("\na <b>")


def luminance(colour):
    """Of `#rrggbb`, as WCAG 2.2 defines it."""
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_text_and_marks_stand_out_from_the_page_by_day_by_night_and_in_print():
    style = files("hqlt_dashboards").joinpath("page.css").read_text()
    palettes = [dict(re.findall(r"--(\w+): (#\w{6});", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)]
    assert len(palettes) == 3
    for palette in palettes:
        paper = luminance(palette["paper"])
        for name, least in {"ink": 7, "soft": 4.5, "accent": 4.5, "line": 3, "quiet": 3}.items():
            light, dark = sorted((luminance(palette[name]), paper), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= least, (name, palette)
