"""Tests of what errors say."""

import pytest

from refold.errors import first_line, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cat.png", "cat.png"),
        ("a b", "a b"),
        ("Käse 猫.jpg", "Käse 猫.jpg"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("two\nlines\ttabbed", "two\\nlines\\ttabbed"),
        ("\u202eexe.gpj", "\\u202eexe.gpj"),
        ("broken \udcff", "broken \\udcff"),
    ],
)
def test_control_characters_are_written_out(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_the_first_sentence_of_an_error() -> None:
    assert first_line(ValueError("One. Two.\nThree")) == "One"
    assert first_line(ValueError()) == "ValueError"
