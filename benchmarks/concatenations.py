"""Choose exact rewrites by latency for networks with concatenations, and measure what that gains, side by side.

Usage: python benchmarks/concatenations.py [--networks NAME ...] [--engines NAME ...] [--results FILE] [--write]
Each network is folded with objective="latency" on each engine and then takes turns with its plain form and with the
RepGhostNet of its width. Results are kept in a JSON file as the run goes, and what is there is not measured again;
--write puts the tables into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

import refold
from pages import put_table
from refold.bench.objective import EngineStopwatch, Timing, fingerprint, fold_by_latency
from refold.files import write_text

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


class Remembering:
    """A stopwatch that writes what it measured of parts of networks to a file, and does not measure it again."""

    def __init__(self, stopwatch: EngineStopwatch, path: Path) -> None:
        self._stopwatch, self._path = stopwatch, path
        self._known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def __call__(self, networks: Sequence[nn.Module], example: torch.Tensor) -> Timing:
        text = "".join(fingerprint(network) for network in networks)
        key = sha256(f"{self._stopwatch.engine} {tuple(example.shape)} {text}".encode()).hexdigest()[:24]
        if key in self._known:
            return Timing(tuple(tuple(samples) for samples in self._known[key]))
        timing = self._stopwatch(networks, example)
        if all(isinstance(network, fx.GraphModule) for network in networks):
            self._known[key] = [[round(sample, 5) for sample in samples] for samples in timing.samples]
            write_text(self._path, json.dumps(self._known))
        return timing


def measure(name: str, engine: str, rounds: int, memory: Path) -> dict[str, Any]:
    """Choose for one network and engine, and time plain, chosen and RepGhostNet in turns."""
    begun = time.monotonic()
    size = 299 if name == "inception_v3" else 224
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    model = refold.create_model(name).eval()
    with EngineStopwatch(engine) as stopwatch:
        chosen: Any = fold_by_latency(model, image, Remembering(stopwatch, memory), engine)
    report = chosen.fold_report
    seconds = time.monotonic() - begun
    networks = [refold.fold(model, image, prove=False), chosen]
    if rival := NETWORKS[name]:
        networks.append(refold.fold(refold.create_model(rival).eval(), image, prove=False))
    with EngineStopwatch(engine, rounds=rounds) as stopwatch:
        timing = stopwatch(networks, image)
    before, after = report.before, report.after
    return {
        "seconds": round(seconds),
        "milliseconds": [timing.median(index) for index in range(len(networks))],
        "ratios": [timing.ratio(index) for index in range(len(networks))],
        "macs": [before.macs, after.macs],
        "concatenations": [each.operators.get("concatenation", 0) for each in (before, after)],
        "distance": report.proof.distance_float64,
        "decisions": report.to_dict()["decisions"],
    }


def table(results: dict[str, Any]) -> str:
    """Every network and engine, one row each."""
    lines = [
        "| network | engine | plain ms | chosen ms | ratio | RepGhostNet | sunk | concatenations "
        "| MACs M | \\|Δ\\| float64 |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for key, row in results.items():
        name, engine = key.split()
        offered = _places(row, "sink")
        rival = f"{row['ratios'][2]:.2f}" if len(row["ratios"]) > 2 else ""
        lines.append(
            f"| `{name}` | {engine} | {row['milliseconds'][0]:.2f} | {row['milliseconds'][1]:.2f} "
            f"| {row['ratios'][1]:.2f} | {rival} | {sum(offered.values())} of {len(offered)} "
            f"| {' → '.join(map(str, row['concatenations']))} "
            f"| {' → '.join(f'{macs / 1e6:.0f}' for macs in row['macs'])} | {row['distance']:.0e} |"
        )
    return "\n".join(lines)


def _places(row: dict[str, Any], kind: str) -> dict[tuple[str, str], bool]:
    """The places where rewrites of a kind were offered, and whether one was kept."""
    kept: dict[tuple[str, str], bool] = {}
    for each in row["decisions"]:
        if each["kind"] == kind:
            place = (each["path"], each["change"].partition(",")[0])
            kept[place] = kept.get(place, False) or each["kept"]
    return kept


def decisions(results: dict[str, Any], key: str) -> str:
    """What was measured for one network, part by part."""
    lines = ["| where | change | ms before | ms after | ratio | |", "|---|---|--:|--:|--:|---|"]
    seen: Counter[tuple[Any, ...]] = Counter()
    rows = [each for each in results[key]["decisions"] if each["kind"] != "reshape" or each["kept"]]
    for each in rows:
        figures = tuple("" if each[n] is None else f"{each[n]:.3f}" for n in ("before", "after"))
        ratio = "" if each["ratio"] is None else f"{each['ratio']:.2f}"
        text = (each["path"] or "whole network", f"{each['kind']}: {each['change']}", *figures, ratio)
        seen[text] += 1
        if seen[text] == 1:
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
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = json.loads(options.results.read_text()) if options.results.exists() else {}
    memory = options.results.with_suffix(".parts.json")
    for engine in options.engines:
        for name in options.networks:
            if f"{name} {engine}" not in results:
                results[f"{name} {engine}"] = measure(name, engine, options.rounds, memory)
                write_text(options.results, json.dumps(results, indent=1))
    print(table(results))
    if options.write:
        text = f"{table(results)}\n\n{decisions(results, 'ghostnet_100 onnxruntime')}"
        put_table("benchmarks.md", "concatenations.py", text)


if __name__ == "__main__":
    main()
