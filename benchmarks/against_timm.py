"""Measure refold's plain networks beside what timm's `reparameterize_model` makes of the same networks.

Usage: python benchmarks/against_timm.py [--engines NAME ...] [--networks NAME ...] [--results FILE] [--write]

Both have the same weights and are checked to compute the same. They take turns (timm, refold, timm, …), batch 1,
224 pixels, one thread, in turns of about 10 ms; the ratio is the median over the rounds. FILE is a result of
`refold.benchmark`: a run that is called again measures what is missing.
"""

import argparse
from pathlib import Path

import timm
import torch
from timm.utils.model import reparameterize_model
from torch import nn

import refold
from pages import put_table
from refold.bench import Benchmark, Measurement

NETWORKS = (
    "ghostnet_100",
    "ghostnetv2_100",
    "ghostnetv3_100",
    "repghostnet_100",
    "repvgg_a0",
    "mobileone_s0",
)
ENGINES = ("onnxruntime", "openvino", "ncnn", "mnn", "pytorch")
IMAGE = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def pair(name: str) -> dict[str, nn.Module]:
    """The network as timm and as refold leave it for inference, under the names of their rows."""
    torch.manual_seed(0)
    theirs = timm.create_model(name).eval()
    ours = refold.create_model(name).eval()
    refold.load_checkpoint(ours, theirs.state_dict())
    theirs, ours = reparameterize_model(theirs), refold.fold(ours, IMAGE, prove=False)
    with torch.inference_mode():
        expected, found = theirs(IMAGE), ours(IMAGE)
    if (expected - found).abs().max() > 1e-4 * (expected.max() - expected.min()):
        raise SystemExit(f"{name}: timm and refold compute different functions")
    return {f"{name} (timm)": theirs, f"{name} (refold)": ours}


def measure(network: str, engine: str, results: Path, rounds: int) -> None:
    models = pair(network)
    result = refold.benchmark(
        models, engine=engine, rounds=rounds, output=results, resume=True, baseline=f"{network} (timm)"
    )
    for row in result.rows:
        if row.configuration.model in models and row.configuration.engine == engine:
            print(row.configuration, row.error or f"{row.latency.median:.3f} ms", flush=True)


def table(results: Benchmark) -> str:
    lines = [
        "| network | engine | operators, timm → refold | timm ms | refold ms | ratio |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for name in NETWORKS:
        for engine in ENGINES:
            theirs, ours = (find(results, f"{name} ({who})", engine) for who in ("timm", "refold"))
            if theirs is None or ours is None:
                continue
            ratio = ours.latency.ratio_to(theirs.latency)
            lines.append(
                f"| {name} | {engine} | {theirs.operators} → {ours.operators} "
                f"| {theirs.latency.median:.2f} | {ours.latency.median:.2f} | {ratio:.2f} |"
            )
    return "\n".join(lines)


def find(results: Benchmark, model: str, engine: str) -> Measurement | None:
    rows = [row for row in results.measured if row.configuration.model == model]
    return next((row for row in rows if row.configuration.engine == engine), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--engines", nargs="*", default=list(ENGINES))
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--results", type=Path, default=Path("against-timm.json"))
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    settings = parser.parse_args()
    for engine in settings.engines:
        for network in settings.networks:
            measure(network, engine, settings.results, settings.rounds)
    if settings.write:
        put_table("benchmarks.md", "against_timm.py", table(Benchmark.load(settings.results)))


if __name__ == "__main__":
    main()
