"""What a fold did: each region, what was left and why, the cost before and after, and the proof."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from refold.folding.proof import Proof
from refold.recording.cost import Cost

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class FoldedRegion:
    """One part of the network that became one layer: where, the operators it had, and the layer."""

    path: str
    operators: dict[str, int]
    layer: str


@dataclass(frozen=True)
class Decision:
    """A rewrite that was measured: milliseconds a call of the part as it was and rewritten, `ratio` of these, taken
    round by round; None where it could not be measured, and `note` says why."""

    path: str
    kind: str
    change: str
    kept: bool
    before: float | None = None
    after: float | None = None
    ratio: float | None = None
    note: str = ""


@dataclass
class FoldReport:
    """The account of one fold. `left` names every batch norm that remains, and every part not looked into, and why."""

    model: str
    regions: list[FoldedRegion]
    left: list[tuple[str, str]]
    before: Cost
    after: Cost
    proof: Proof | None
    notes: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    """How `fold` has to be called, besides its defaults, to fold a network of this architecture in the same way."""
    measured: dict[str, Any] = field(default_factory=dict)
    """The engine and its threads on which `decisions` were measured, and the ratio of the whole network."""
    record: list[dict[str, Any]] | None = field(default_factory=list)
    """The places that changed, in order, and what stands there now: what `refold.load` applies to a new network.
    None where one of them has no form as plain values."""
    decisions: list[Decision] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The same facts as plain JSON-able values."""
        return {
            "model": self.model,
            "options": self.options,
            "measured": self.measured,
            "decisions": [asdict(decision) for decision in self.decisions],
            "notes": self.notes,
            "regions": [asdict(region) for region in self.regions],
            "left": [{"name": name, "reason": reason} for name, reason in self.left],
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "proof": None if self.proof is None else self.proof.to_dict(),
            "record": self.record,
        }

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> FoldReport:
        """The report that `to_dict` wrote. Raises KeyError and TypeError where it did not."""
        proof = facts["proof"]
        return cls(
            model=facts["model"],
            regions=[FoldedRegion(**region) for region in facts["regions"]],
            left=[(item["name"], item["reason"]) for item in facts["left"]],
            before=Cost(**facts["before"]),
            after=Cost(**facts["after"]),
            proof=None if proof is None else Proof(**{**proof, "inputs": tuple(proof["inputs"])}),
            notes=list(facts["notes"]),
            options=dict(facts["options"]),
            measured=dict(facts.get("measured", {})),
            record=facts.get("record"),
            decisions=[Decision(**each) for each in facts.get("decisions", [])],
        )

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.text import Text

        parts: list[Any] = [_cost_table(self)]
        if self.decisions:
            parts.append(_decision_table(self))
        if self.left:
            parts.append(_left_table(self.left))
        parts += [Text(line) for line in (_proof_line(self.proof), *self.notes)]
        return Group(*parts)


def _cost_table(report: FoldReport) -> Any:
    from rich.table import Table
    from rich.text import Text

    title = Text(f"{report.model}: {len(report.regions)} regions folded")
    table = Table(title=title, title_justify="left")
    for name in ("", "before", "after"):
        table.add_column(name, justify="right" if name else "left")
    before, after = report.before, report.after
    rows = [
        ("parameters", before.parameters, after.parameters),
        ("multiply-accumulates", before.macs, after.macs),
        ("activations", before.activations, after.activations),
        ("operators", before.operator_count, after.operator_count),
    ]
    kinds = list(dict.fromkeys([*before.operators, *after.operators]))
    changed = [k for k in kinds if before.operators.get(k, 0) != after.operators.get(k, 0)]
    rows += [(f"  {kind}", before.operators.get(kind, 0), after.operators.get(kind, 0)) for kind in changed]
    for name, old, new in rows:
        table.add_row(name, f"{old:,}", f"{new:,}")
    return table


def _decision_table(report: FoldReport) -> Any:
    from rich.table import Table
    from rich.text import Text

    def number(value: float | None, digits: int = 3) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    engine, threads = report.measured.get("engine"), report.measured.get("threads")
    title = f"measured on {engine}, {threads} thread{'' if threads == 1 else 's'}"
    table = Table(title=title, title_justify="left")
    for name in ("where", "change", "ms before", "ms after", "ratio", ""):
        table.add_column(name, justify="right" if name.startswith(("ms", "ratio")) else "left")
    for each in report.decisions:
        figures = (number(each.before), number(each.after), number(each.ratio, 2))
        outcome = "kept" if each.kept else each.note or "no gain"
        table.add_row(
            Text(each.path or "the whole network"),
            Text(f"{each.kind}: {each.change}"),
            *figures,
            Text(outcome),
        )
    return table


def _left_table(left: list[tuple[str, str]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="left as it was", title_justify="left")
    table.add_column("how many", justify="right")
    table.add_column("first of them")
    table.add_column("why")
    counts = Counter(reason for _, reason in left)
    for reason, count in counts.most_common():
        first = next(name for name, why in left if why == reason)
        table.add_row(str(count), Text(first), Text(reason))
    return table


def _proof_line(proof: Proof | None) -> str:
    if proof is None:
        return "not proved, as asked"
    line = (
        f"proved: {proof.regions} regions to {proof.worst_region:.0e}, the network to {proof.distance_float64:.0e} "
        f"in float64, on {' and '.join(proof.inputs)}"
    )
    if proof.original_distance is not None and proof.folded_distance is not None:
        line += (
            f"; in its own dtype {proof.folded_distance:.1e} from the float64 result "
            f"(before folding {proof.original_distance:.1e})"
        )
    return line
