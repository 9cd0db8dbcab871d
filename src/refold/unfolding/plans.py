"""Branch plans as data: which branches the papers put beside which kind of layer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

from refold.errors import InputError

Kind = Literal["pointwise", "depthwise", "dense", "grouped"]
"""1x1 convolutions; and larger kernels with one input channel a group, with one group, with anything between."""
Shape = Literal[
    "1x1",
    "identity",
    "column",
    "row",
    "smaller",
    "smallest",
    "smaller row",
    "smallest column",
    "split",
    "average",
    "1x1, average",
    "1x1, same",
]
"""A branch beside a layer with kernel k x k, groups and stride as the layer:

- `1x1`; `column`, k x 1; `row`, 1 x k; `smaller` and `smallest`, k-2 and k-4 in both directions; `smaller row`,
  1 x k-2; `smallest column`, k-4 x 1: a convolution with that kernel and a batch norm.
- `identity`: a batch norm of the input.
- `split`: kernels of k-4, k-2 and k for a third of the channels each, and a batch norm (RepNeXt, eq. 1).
- `average`: a k x k average pool and a batch norm.
- `1x1, average` and `1x1, same`: a 1x1 convolution and a batch norm, its border continued by what it makes of zeros,
  then a k x k average pool or convolution, and a batch norm.

A branch that does not fit a layer is left out: the identity where channels or the size of the map change, kernels that
would be smaller than 1 or cannot be centred.
"""


@dataclass(frozen=True)
class Plan:
    """The branches beside each kind of layer. `repeats` kernels have the layer's own size, the layer's own among them.

    Raises `InputError` for no rules, for kinds and shapes that there are not, and for repeats below one.
    """

    name: str
    rules: Mapping[Kind, Sequence[Shape]]
    repeats: int = 1
    source: str = ""

    def __post_init__(self) -> None:
        if not self.rules or any(isinstance(shapes, str) for shapes in self.rules.values()):
            raise InputError(
                f"The plan '{self.name}' has the rules {dict(self.rules)!r}; name the branches of a kind of layer in a "
                "list, such as {'depthwise': ['1x1', 'identity']}."
            )
        for what, given, known in (
            ("kind of layer", self.rules, get_args(Kind)),
            ("branch", [shape for shapes in self.rules.values() for shape in shapes], get_args(Shape)),
        ):
            for value in given:
                if value not in known:
                    raise InputError(
                        f"The plan '{self.name}' names a {what} '{value}' that there is not; choose from: "
                        f"{', '.join(map(repr, known))}."
                    )
        if self.repeats < 1:
            raise InputError(
                f"The plan '{self.name}' has {self.repeats} repeats; the layer itself is one, so 1 or more."
            )


_LARGE: tuple[Kind, ...] = ("depthwise", "dense", "grouped")
_DBB: tuple[Shape, ...] = ("1x1", "1x1, average", "1x1, same")

PLANS = {
    plan.name: plan
    for plan in (
        Plan(
            "ghostnetv3",
            {"depthwise": ("1x1", "identity"), "pointwise": ("identity",)},
            repeats=3,
            source="GhostNetV3, section 4.1 and table 2",
        ),
        Plan(
            "repvgg",
            {"dense": ("1x1", "identity"), "grouped": ("1x1", "identity")},
            source="RepVGG report, figure 2",
        ),
        Plan(
            "mobileone",
            {
                "depthwise": ("1x1", "identity"),
                "dense": ("1x1", "identity"),
                "grouped": ("1x1", "identity"),
                "pointwise": ("identity",),
            },
            repeats=4,
            source="MobileOne, section 3.3; four repeats are those of S0",
        ),
        Plan("acb", dict.fromkeys(_LARGE, ("column", "row")), source="ACNet"),
        Plan(
            "dbb",
            {"dense": _DBB, "grouped": _DBB, "depthwise": ("average", "1x1, same")},
            source="Diverse Branch Block",
        ),
        Plan("repunit1", {"depthwise": ("split",)}, source="RepNeXt, section 3, figure 2a"),
        Plan("repunit2", {"depthwise": ("smaller", "smallest")}, source="RepNeXt, section 3, figure 2b"),
        Plan(
            "repunit3",
            {"depthwise": ("smaller row", "smallest column")},
            source="RepNeXt, section 3, figure 2c",
        ),
        Plan("repghost", {"depthwise": ("identity",)}, source="RepGhost, figure 3"),
    )
}


def find_plan(plan: str | Path | Plan) -> Plan:
    """The plan of that name, or of that YAML or JSON file.

    Raises `InputError`, with the nearest name, where there is none, and where the file is not understood.
    """
    if isinstance(plan, Plan):
        return plan
    if not isinstance(plan, (str, Path)):
        raise InputError(f"The plan is {plan!r}; give a name ({', '.join(PLANS)}), a file or a Plan.")
    if plan in PLANS:
        return PLANS[str(plan)]
    if Path(plan).suffix in (".yaml", ".yml", ".json"):
        return _read(Path(plan))
    near = get_close_matches(str(plan), PLANS, n=1, cutoff=0.4)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise InputError(
        f"There is no branch plan '{plan}'.{hint} There are: {', '.join(PLANS)}; or give a Plan, or a .yaml file."
    )


def _read(path: Path) -> Plan:
    known = [field.name for field in dataclasses.fields(Plan)]
    try:
        text = path.read_text(encoding="utf-8")
        document = json.loads(text) if path.suffix == ".json" else _parsed_yaml(text)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise InputError(f"The plan '{path}' cannot be read ({reason}); correct it.") from error
    rules = document.get("rules") if isinstance(document, dict) else None
    if not isinstance(rules, dict) or not all(isinstance(shapes, list) for shapes in rules.values()):
        raise InputError(
            f"The plan '{path}' has no rules; write under 'rules' a list of branches for each kind of layer, such as "
            "depthwise: [1x1, identity]."
        )
    if strangers := sorted(map(str, document.keys() - set(known))):
        raise InputError(f"The plan '{path}' has no key '{strangers[0]}'; there are: {', '.join(known)}.")
    repeats = document.get("repeats", 1)
    if not isinstance(repeats, int):
        raise InputError(f"'repeats' is {repeats!r} in the plan '{path}'; expected a whole number.")
    return Plan(str(document.get("name", path.stem)), rules, repeats, str(document.get("source", "")))


def _parsed_yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
