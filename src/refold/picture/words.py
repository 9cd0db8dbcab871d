"""What the picture and its page say in words and numbers."""

from __future__ import annotations

import math

from refold.folding import FoldReport

Total = tuple[str, int, int, tuple[str, str]]


def summary(report: FoldReport) -> str:
    """What the fold did, in one sentence."""
    if not report.regions:
        same = report.before == report.after
        return f"Nothing was folded{': the network stays as it was' if same else ''}."
    count = len(report.regions)
    return f"{count} part{' was' if count == 1 else 's were'} folded into plain layers."


def totals(report: FoldReport) -> list[Total]:
    """What the network had and has: a name, both numbers, and both in few characters."""
    before, after = report.before, report.after
    rows = [
        ("operators", before.operator_count, after.operator_count),
        ("convolutions", before.convolutions, after.convolutions),
        ("batch norms", before.batch_norms, after.batch_norms),
        ("parameters", before.parameters, after.parameters),
        ("multiply-accumulates", before.macs, after.macs),
    ]
    return [(name, old, new, _shortened(old, new)) for name, old, new in rows]


def verdict(report: FoldReport) -> str:
    """The proof in one line."""
    proof = report.proof
    if proof is None:
        return "Not proved, as asked."
    parts = [f"each part to {proof.worst_region:.0e}"] if proof.regions else []
    # A report that was written and read has None where the distance was no finite number: nothing was compared.
    if isinstance(proof.distance_float64, float) and math.isfinite(proof.distance_float64):
        parts.append(f"the whole network to {proof.distance_float64:.0e}")
    return f"Proved in float64: {', '.join(parts)}." if parts else "Nothing could be compared."


def left_by_reason(report: FoldReport) -> list[tuple[str, list[str]]]:
    """Every reason to leave something with the names of what was left, the most frequent first."""
    groups: dict[str, list[str]] = {}
    for name, reason in report.left:
        groups.setdefault(reason, []).append(name)
    return sorted(groups.items(), key=lambda group: -len(group[1]))


def remarks(report: FoldReport) -> list[str]:
    """The notes of the report, and what its measurements came to."""
    notes = list(report.notes)
    if report.decisions:
        threads = report.measured.get("threads")
        kept = sum(decision.kept for decision in report.decisions)
        notes.append(
            f"Measured on {report.measured.get('engine')}, {threads} thread{'' if threads == 1 else 's'}: "
            f"{kept} of {len(report.decisions)} rewrites were kept."
        )
    return notes


def _shortened(before: int, after: int) -> tuple[str, str]:
    """Both numbers with as few digits as show that they differ, three at least."""
    for digits in range(3, 7):
        texts = _short(before, digits), _short(after, digits)
        if before == after or texts[0] != texts[1]:
            return texts
    return f"{before:,}", f"{after:,}"


def _short(number: int, digits: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6)):
        if number >= size:
            whole = len(str(number // size))
            return f"{number / size:.{max(digits - whole, 0)}f} {unit}"
    return f"{number:,}"
