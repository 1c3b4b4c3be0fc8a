"""The page of a report: one file, nothing fetched, nothing from data obeyed, everything named and readable."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import pytest
from reports import HOSTILE, example

from molora.reports import heat, html_page, markdown
from molora.reports.charts import number, ticks
from molora.reports.markup import Html, embedded, tag
from molora.reports.names import by_kind, in_order, shortened
from molora.reports.pictures import draw
from molora.reports.summary import prose

SENTENCE = "Nothing is there. Give `--data FILE`."
MISSING = dict.fromkeys(("scores", "curves", "loads", "usage", "affinity", "cosines", "tokens"), SENTENCE)


class Elements(HTMLParser):
    """Every element of a page, and its text outside scripts and style."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.text += data

    def named(self, name: str) -> list[dict[str, str | None]]:
        """Attributes of the elements of a name."""
        return [attributes for tag, attributes in self.found if tag == name]


def test_text_from_data_is_shown_and_never_obeyed() -> None:
    page = html_page(example(HOSTILE))
    elements = Elements(page)
    assert [one.get("type") for one in elements.named("script")] == ["application/json", None]
    assert not elements.named("img")
    assert not any(name.startswith("on") for _, attributes in elements.found for name in attributes)
    assert elements.text.count(HOSTILE) >= 8
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    assert json.loads(data[1])["tokens"]["pieces"][3] == HOSTILE


def test_the_page_needs_no_other_file_and_allows_its_own_script_only() -> None:
    page = html_page(example())
    elements = Elements(page)
    for name in ("src", "href", "srcset", "action"):
        assert all(
            str(attributes[name]).startswith(("#", "data:")) for _, attributes in elements.found if name in attributes
        )
    assert not re.findall(r"https?://|@import|url\((?!#hatch)", page)
    policy = next(str(one["content"]) for one in elements.named("meta") if "http-equiv" in one)
    assert policy.startswith("default-src 'none'")
    assert "script-src 'sha256-" in policy


def test_headings_pictures_and_controls_have_names() -> None:
    elements = Elements(html_page(example()))
    assert len(elements.named("h1")) == 1
    identifiers = [str(attributes["id"]) for _, attributes in elements.found if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    assert all(str(link["href"])[1:] in identifiers for link in elements.named("a"))
    assert all("aria-label" in svg or svg.get("aria-hidden") for svg in elements.named("svg"))
    labelled = {label.get("for") for label in elements.named("label")}
    assert all(one["id"] in labelled for name in ("select", "input") for one in elements.named(name))


def test_a_section_without_data_says_how_to_get_it() -> None:
    page = html_page(example(**MISSING))  # type: ignore[arg-type]  # sentences
    assert page.count("Nothing is there. Give <code>--data FILE</code>.") == len(MISSING)
    assert "<select" not in page
    card = markdown(example(**MISSING), {})  # type: ignore[arg-type]  # likewise
    assert card.count("Nothing is there. Give `--data FILE`.") == 2  # scores, and once for routing
    assert 'pip install "molora\\[report]"' in card or 'pip install "molora[report]"' in card


def test_markdown_shows_text_and_takes_none_for_markup() -> None:
    card = markdown(example(HOSTILE + "|a|*b*[c](d)\n# e"), {"load.png": "load"})
    assert "<script" not in card.replace("\\<", "")
    assert "\\|a\\|\\*b\\*\\[c\\](d) \\# e" in card
    assert "![load](load.png)" in card
    assert all(line.count("|") - line.count("\\|") == 7 for line in card.splitlines() if line.startswith("| "))


@pytest.mark.parametrize(
    ("kind", "value", "experts", "expected"),
    [
        (heat.LOAD, 0.25, 4, ("low", 0.0)),
        (heat.LOAD, 0.5, 4, ("high", 0.5)),
        (heat.LOAD, 1.0, 4, ("high", 1.0)),
        (heat.LOAD, 0.125, 4, ("low", 0.5)),
        (heat.LOAD, 0.024, 4, ("dead", 1.0)),
        (heat.LOAD, 0.026, 4, ("low", 1.0)),
        (heat.LOAD, 0.0, 4, ("dead", 1.0)),
        (heat.SHARE, 0.75, 4, ("high", 1.0)),
        (heat.SHARE, 0.0, 4, ("high", 0.0)),
        (heat.COSINE, -0.5, 4, ("low", 0.5)),
        (heat.COSINE, 1.0, 4, ("high", 1.0)),
    ],
)
def test_colours_say_how_far_from_even_a_value_is(
    kind: str, value: float, experts: int, expected: tuple[str, float]
) -> None:
    assert heat.shade(kind, value, experts) == expected


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 80, [0, 20, 40, 60, 80]), (0.1, 0.42, [0.1, 0.2, 0.3, 0.4]), (3, 3, [3]), (-1, 1, [-1, -0.5, 0, 0.5, 1])],
)
def test_ticks_are_round_and_inside(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.00005, "5.0e-5"), (1.23456, "1.23"), (1234.5, "1,234"), (123456.0, "1.2e5")]
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


def test_linears_are_in_the_order_of_layers_and_named_by_them() -> None:
    ordered = sorted(["a.10.x", "a.2.y", "a.2.x"], key=in_order)
    assert ordered == ["a.2.x", "a.2.y", "a.10.x"]
    assert shortened(ordered) == ["2.x", "2.y", "10.x"]
    assert by_kind(ordered) == {"x": [(0, "2"), (2, "10")], "y": [(1, "2")]}
    assert by_kind(["enc.0.q", "dec.0.q"]) == {"q": [(0, "enc.0.q"), (1, "dec.0.q")]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a `b*` c*", "a `b*` c\\*"), ("plain", "plain"), ("`x`", "`x`"), ("no <b> `y`", "no \\<b\\> `y`")],
)
def test_code_in_sentences_stays_code(text: str, expected: str) -> None:
    assert prose(text) == expected


def test_elements_escape_what_is_no_markup() -> None:
    assert tag("p", "<b>", Html("<i></i>"), None, title='"', hidden=True, lang=None) == (
        '<p title="&quot;" hidden>&lt;b&gt;<i></i></p>'
    )
    data = embedded("x", ["<a>&</script><!--"])
    inner = data.removeprefix('<script type="application/json" id="x">').removesuffix("</script>")
    assert not set("<>&") & set(inner)
    assert json.loads(inner) == ["<a>&</script><!--"]
    with pytest.raises(ValueError, match="JSON"):
        embedded("x", [math.nan])


def luminance(colour: tuple[float, ...]) -> float:
    """As WCAG 2 has it."""
    red, green, blue = (one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first: tuple[float, ...], second: tuple[float, ...]) -> float:
    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_on_everything_it_stands_on(dark: bool) -> None:
    style = (Path(heat.__file__).parent / "page.css").read_text(encoding="utf-8")
    light_part, dark_part = style.split("@media (prefers-color-scheme: dark)")
    declared = light_part + (dark_part.split("* {")[0] if dark else "")
    values = dict(re.findall(r"--(\w+): (#\w{6}|\d+%);", declared))
    colours = {
        name: tuple(int(value[at : at + 2], 16) / 255 for at in (1, 3, 5))
        for name, value in values.items()
        if value.startswith("#")
    }
    share = int(values["tint"].removesuffix("%")) / 100
    tokens = [
        tuple(share * of + (1 - share) * under for of, under in zip(colours[f"e{at}"], colours["card"], strict=True))
        for at in range(8)
    ]
    cells = [colours["high"], colours["low"]]
    for text, grounds in {
        "ink": [colours["paper"], colours["card"], *tokens, *cells],
        "soft": [colours["paper"], colours["card"]],
        "accent": [colours["paper"], colours["card"]],
        "good": [colours["card"]],
        "bad": [colours["card"]],
    }.items():
        assert all(contrast(colours[text], ground) >= 4.5 for ground in grounds), text


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_pictures_for_model_cards_are_drawn(tmp_path: Path) -> None:
    made = draw(example("tasks"), tmp_path)
    assert sorted(made) == ["experts.png", "load.png", "tasks.png", "training.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in made)
    assert draw(example(**MISSING), tmp_path) == {}  # type: ignore[arg-type]  # sentences
