"""Options are read from a dataclass as it declares them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from refold.training.options import Option, declared_options


@dataclass
class Told:
    folder: Annotated[Path, Option("Where to.")]
    recipe: Annotated[dict[str, int], Option("By name.", given_as=str, default="quick")]
    plain: int = 3
    weights: Annotated[str | None, Option("Whose.", given_as=Path)] = None
    size: Annotated[int, Option("How large.", least=1)] = 2


def test_options_are_those_with_a_declaration() -> None:
    read = {option.name: (option.type, option.default) for option in declared_options(Told)}
    assert read == {
        "folder": (Path | None, None),
        "recipe": (str, "quick"),
        "weights": (Path | None, None),
        "size": (int, 2),
    }
    assert declared_options(Told)[-1].option == Option("How large.", least=1)
