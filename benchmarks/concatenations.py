"""Measure what sinking concatenations gains, and what the latency objective makes of it, side by side.

Usage: python benchmarks/concatenations.py [--networks NAME ...] [--engines NAME ...] [--results FILE] [--write]
Forms of a network take turns: plain, every concatenation apart, those within one block apart and filled up with
zeros, what the latency objective chose on that engine, and the RepGhostNet of its width. Results are kept in a JSON
file as the run goes, networks beside it, and what is there is not made or measured again; --steps does only some of
the work, and --write puts the tables into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

import refold
from pages import put_table
from refold import folding
from refold.bench.objective import EngineStopwatch, Latency, fingerprint
from refold.bench.timing import Timing
from refold.files import write_text
from refold.folding.alternatives import SINK, Alternative

# Each network beside the RepGhostNet of its width.
NETWORKS = {
    "ghostnet_050": "repghostnet_050",
    "ghostnet_100": "repghostnet_100",
    "ghostnet_130": "repghostnet_130",
    "ghostnetv2_100": "repghostnet_100",
    "ghostnetv3_100": "repghostnet_100",
    "densenet121": None,
    "inception_v3": None,
    "repnext_u3_t": None,
}


STEPS = ("prepare", "choose", "compare")


class Remembering:
    """A stopwatch that writes what it measured of parts of networks to a file, and does not measure it again."""

    def __init__(self, stopwatch: EngineStopwatch, path: Path) -> None:
        self._stopwatch, self._path = stopwatch, path
        self._known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def __call__(self, networks: Sequence[nn.Module], example: torch.Tensor) -> tuple[Timing, ...]:
        text = "".join(fingerprint(network) for network in networks)
        key = sha256(f"{self._stopwatch.engine} {tuple(example.shape)} {text}".encode()).hexdigest()[:24]
        if key in self._known:
            return tuple(Timing(tuple(samples)) for samples in self._known[key])
        timings = self._stopwatch(networks, example)
        if all(isinstance(network, fx.GraphModule) for network in networks):
            self._known[key] = [[round(sample, 5) for sample in timing.samples] for timing in timings]
            write_text(self._path, json.dumps(self._known))
        return timings


def choose(name: str, engine: str, memory: Path) -> dict[str, Any]:
    """What the latency objective keeps of a network on an engine, with the figures."""
    begun = time.monotonic()
    with EngineStopwatch(engine) as stopwatch:
        time_parts = Remembering(stopwatch, memory)
        objective = Latency(engine, stopwatch=time_parts)
        chosen: Any = refold.fold(refold.create_model(name).eval(), image_for(name), objective=objective)
    report = chosen.fold_report
    return {
        "seconds": round(time.monotonic() - begun),
        "rewrites": report.options.get("rewrites", []),
        "decisions": report.to_dict()["decisions"],
    }


def image_for(name: str) -> torch.Tensor:
    size = 299 if name == "inception_v3" else 224
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))


def everything(alternatives: Sequence[Alternative]) -> Alternative | None:
    """Takes every concatenation apart."""
    return alternatives[0] if alternatives[0].kind == SINK else None


def filled_in_blocks(alternatives: Sequence[Alternative]) -> Alternative | None:
    """Takes those apart that sink within one block, filled up with zeros where that is offered."""
    return alternatives[-1] if alternatives[0].kind == SINK and alternatives[0].path.count(".") > 1 else None


def prepared(name: str, form: str, folder: Path, rewrites: Any = ()) -> nn.Module:
    """A form of a network with its proof, made from the plain one, once, and kept in a file."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name} {form}.pt"
    if not path.exists():
        model = prepared(name, "plain", folder) if rewrites else refold.create_model(name).eval()
        torch.save(folding.fold(model, image_for(name), rewrites=rewrites), path)
    network: nn.Module = torch.load(path, weights_only=False)
    return network


def forms_of(name: str, folder: Path) -> dict[str, nn.Module]:
    """The forms that are the same for every engine."""
    forms = {"plain": prepared(name, "plain", folder)}
    forms["apart"] = prepared(name, "apart", folder, everything)
    forms["in blocks"] = prepared(name, "in blocks", folder, filled_in_blocks)
    if rival := NETWORKS[name]:
        forms["RepGhostNet"] = prepared(rival, "plain", folder)
    return forms


def compare(
    name: str, engine: str, rounds: int, folder: Path, chosen: dict[str, Any] | None
) -> dict[str, Any]:
    """Time all forms of a network in turns."""
    forms = forms_of(name, folder)
    if chosen is not None:
        forms["chosen"] = prepared(name, f"chosen for {engine}", folder, chosen["rewrites"])
    with EngineStopwatch(engine, rounds=rounds) as stopwatch:
        timings = stopwatch(list(forms.values()), image_for(name))
    rows = {}
    for (form, network), timing in zip(forms.items(), timings, strict=True):
        report: Any = network.fold_report
        rows[form] = {
            "milliseconds": timing.median,
            "ratio": timing.ratio_to(timings[0]),
            "macs": report.after.macs,
            "concatenations": report.after.operators.get("concatenation", 0),
            "distance": report.proof.distance_float64,
        }
    return rows


def table(compared: dict[str, Any]) -> str:
    """Every network and engine, one row each."""
    forms = ("apart", "in blocks", "chosen", "RepGhostNet")
    lines = [
        f"| network | engine | plain ms | {' | '.join(forms)} | concatenations | MACs M | \\|Δ\\| float64 |",
        f"|---|---|--:|{'--:|' * len(forms)}--:|--:|--:|",
    ]
    for key in sorted(compared, key=lambda key: list(NETWORKS).index(key.split()[0])):
        rows, (name, engine) = compared[key], key.split()
        ours = [row for form, row in rows.items() if form != "RepGhostNet"]
        ratios = [f"{rows[form]['ratio']:.2f}" if form in rows else "" for form in forms]
        counts = " / ".join(str(row["concatenations"]) for row in ours)
        macs = " / ".join(f"{row['macs'] / 1e6:.0f}" for row in ours)
        worst = max(row["distance"] for row in ours)
        lines.append(
            f"| `{name}` | {engine} | {rows['plain']['milliseconds']:.2f} | {' | '.join(ratios)} "
            f"| {counts} | {macs} | {worst:.0e} |"
        )
    return "\n".join(lines)


def decisions(chosen: dict[str, Any]) -> str:
    """What was measured for one network, part by part; equal parts once."""
    lines = ["| where | change | ms before | ms after | ratio | |", "|---|---|--:|--:|--:|---|"]
    seen = set()
    for each in chosen["decisions"]:
        figures = tuple("" if each[n] is None else f"{each[n]:.3f}" for n in ("before", "after"))
        ratio = "" if each["ratio"] is None else f"{each['ratio']:.2f}"
        measured = (each["kind"], each["change"], *figures, ratio)
        if measured not in seen:
            seen.add(measured)
            text = (
                each["path"] or "across the network",
                f"{each['kind']}: {each['change']}",
                *figures,
                ratio,
            )
            lines.append(f"| {' | '.join(text)} | {'kept' if each['kept'] else each['note'] or 'no gain'} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--engines", nargs="+", default=["onnxruntime", "openvino"])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--results", type=Path, default=Path("concatenations.json"))
    parser.add_argument("--steps", nargs="*", default=list(STEPS), choices=STEPS)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"chosen": {}, "compared": {}}
    if options.results.exists():
        results = json.loads(options.results.read_text())
    memory, folder = (options.results.with_suffix(end) for end in (".parts.json", ".networks"))
    for step, engine, name in product(options.steps, options.engines, options.networks):
        key = f"{name} {engine}"
        if step == "prepare":
            forms_of(name, folder)
        elif step == "choose" and key not in results["chosen"]:
            results["chosen"][key] = choose(name, engine, memory)
            results["compared"].pop(key, None)
        elif step == "compare" and key not in results["compared"]:
            chosen = results["chosen"].get(key)
            results["compared"][key] = compare(name, engine, options.rounds, folder, chosen)
        write_text(options.results, json.dumps(results, indent=1))
    print(table(results["compared"]))
    if options.write:
        shown = results["chosen"].get("ghostnet_100 onnxruntime")
        text = table(results["compared"]) + (f"\n\n{decisions(shown)}" if shown else "")
        put_table("benchmarks.md", "concatenations.py", text)


if __name__ == "__main__":
    main()
