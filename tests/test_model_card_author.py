"""What its author wrote in a card survives: our part takes its place in the text, and no more."""

from __future__ import annotations

import logging

import pytest
from cards import TARGETS, WORDS, front_of, on_hub, text_of
from huggingface_hub import ModelCard
from methods import build
from reports import write_adapter, write_base

from molora.card.job import update_card
from molora.card.place import placed


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("disk") / "tiny-base")


def test_what_the_author_wrote_around_ours_survives_every_save(tmp_path):
    model = on_hub(build("molora", target_modules=TARGETS))
    model.save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    edited = text_of(tmp_path).replace("# A mixture of LoRA experts on", f"# My own title\n\n{WORDS}\n\nAbout")
    edited = (
        edited.replace("library_name:", "language: en\nlicense: apache-2.0\nlibrary_name:") + f"\nBelow. {WORDS}\n"
    )
    path.write_text(edited)
    model.peft_config["default"].temperature = 2.0
    model.save_pretrained(tmp_path)
    text, front = text_of(tmp_path), front_of(tmp_path)
    assert text.index("# My own title") < text.index("temperature 2") < text.index(f"Below. {WORDS}")
    assert text.count(WORDS) == 2
    assert "temperature 1" not in text
    assert (front["language"], front["license"]) == ("en", "apache-2.0")
    assert "The adapter's licence is `apache-2.0`." in text
    model.save_pretrained(tmp_path)
    assert text_of(tmp_path) == text


TEXTS = {
    "nothing": ("", "# T\n\n[ours]\n"),
    "the author's text alone": (f"# Mine\n\n{WORDS}", f"# Mine\n\n{WORDS}\n\n[ours]\n"),
    "the version that PEFT adds": (f"{WORDS}\n### Framework versions\n\n- PEFT 0.1.2", f"{WORDS}\n\n[ours]\n"),
    "the template": (str(ModelCard.from_template(ModelCard("").data).text), "# T\n\n[ours]\n"),
    "a mark without its end": (f"<!-- molora:begin -->\n{WORDS}", f"{WORDS}\n\n[ours]\n"),
    "an end without its mark": (f"{WORDS}\n<!-- molora:end -->", f"{WORDS}\n\n[ours]\n"),
    "both marks": (f"a\n<!-- molora:begin x -->old<!-- molora:end -->\n{WORDS}", f"a\n[ours]\n{WORDS}"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_our_part_takes_its_place_and_no_more(case):
    text, expected = TEXTS[case]
    found = placed(text, "OURS <!-- molora:end -->", "T")
    block = found[found.index("<!-- molora:begin") : found.index("<!-- molora:end -->") + len("<!-- molora:end -->")]
    assert "OURS" in block
    assert found.replace(block, "[ours]") == expected
    assert placed(found, "OURS", "T") == found, "a second time changes nothing"


def test_the_template_that_an_author_filled_in_stays():
    template = str(ModelCard.from_template(ModelCard("").data).text)
    filled = template.replace("- **Developed by:** [More Information Needed]", "- **Developed by:** me")
    assert "- **Developed by:** me" in placed(filled, "OURS", "T")


def test_a_card_that_cannot_be_read_is_left_alone_and_said_so(base, tmp_path, caplog):
    folder = write_adapter(tmp_path / "adapter", base, target_modules=TARGETS)
    broken = "---\ntags: [\n---\nMine\n"
    (folder / "README.md").write_text(broken)
    with caplog.at_level(logging.WARNING):
        update_card(folder)
    assert text_of(folder) == broken
    assert "was left as it is" in caplog.text
    assert "Correct it" in caplog.text


def test_front_matter_behind_a_mark_of_the_byte_order_stays(base, tmp_path):
    folder = write_adapter(tmp_path / "adapter", base, target_modules=TARGETS)
    (folder / "README.md").write_text(f"---\nlicense: mit\n---\n{WORDS}\n", encoding="utf-8-sig")
    update_card(folder)
    assert front_of(folder)["license"] == "mit"
    assert text_of(folder).startswith("---\nlibrary_name: peft\n")
    assert text_of(folder).count("license: mit") == 1
    assert WORDS in text_of(folder)
