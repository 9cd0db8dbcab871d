"""Export networks to every engine that is installed, and write how far each is from PyTorch to docs/export.md.

Usage: python benchmarks/export_engines.py [--engines NAME ...] [--networks NAME ...] [--results FILE] [--write]
Results are kept in a JSON file and merged, so that engines of other environments can be added by a second run.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import refold
from pages import put_table
from refold.errors import RefoldError
from refold.export import FORMATS, installed_engines

NETWORKS = ("ghostnet_100", "repghostnet_100", "repvgg_a0", "mobileone_s0", "ghostnetv3_100", "repnext_u3_t")


def lively(model: nn.Module) -> nn.Module:
    """Give batch norms the statistics and gains of a trained network's order, so that the logits spread."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                count = module.num_features
                module.running_mean = torch.randn(count, generator=generator) * 0.1
                module.running_var = torch.rand(count, generator=generator) + 0.5
                module.weight.copy_(torch.rand(count, generator=generator) + 0.5)
                module.bias.copy_(torch.randn(count, generator=generator) * 0.1)
    return model.eval()


def measure(plain: nn.Module, image: torch.Tensor, engine: str, *, half: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"network{FORMATS[engine].suffix}"
        try:
            report = refold.export(plain, path, image, engine=engine, half=half, tolerance=float("inf"))
        except RefoldError as error:
            return {"failed": " ".join(str(error).split())}
    top1 = [trial.same_top1 for trial in report.trials if trial.same_top1 is not None]
    return {
        "difference": report.relative_difference if report.checked else None,
        "same": sum(top1),
        "images": sum(trial.batch_size for trial in report.trials),
        "megabytes": report.bytes / 1e6,
    }


def table(results: dict[str, Any], networks: list[str]) -> str:
    lines = [
        "| network | engine | float32: max \\|Δ\\| | same top-1 | MB | float16: max \\|Δ\\| | same top-1 | MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for network in networks:
        for engine, form in FORMATS.items():
            cells = [
                cell
                for precision in ("float32", "float16")
                for cell in _cells(results.get(f"{network} {engine} {precision}"))
            ]
            if any(cells):
                lines.append(f"| {network} | {form.title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(result: dict[str, Any] | None) -> list[str]:
    if result is None:
        return ["", "", ""]
    if "failed" in result:
        return [result["failed"], "", ""]
    megabytes = f"{result['megabytes']:.1f}"
    if result["difference"] is None:
        return ["not run", "", megabytes]
    return [f"{result['difference']:.1e}", f"{result['same']} of {result['images']}", megabytes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", nargs="*", default=installed_engines())
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--precisions", nargs="*", default=["float32", "float16"])
    parser.add_argument("--results", type=Path, default=Path("export-engines.json"))
    parser.add_argument("--write", action="store_true", help="put the table into docs/export.md")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads(settings.results.read_text()) if settings.results.is_file() else {}
    for network in settings.networks:
        torch.manual_seed(0)
        image = torch.randn(1, 3, 224, 224)
        plain: Any = None
        for precision in settings.precisions:
            for engine in settings.engines:
                name = f"{network} {engine} {precision}"
                if name in known:
                    continue
                if plain is None:
                    plain = refold.fold(lively(refold.create_model(network)), image, prove=False)
                known[name] = measure(plain, image, engine, half=precision == "float16")
                print(name, known[name], flush=True)
                settings.results.write_text(json.dumps(known, indent=2))
    if settings.write:
        measured = [name for name in NETWORKS if any(key.startswith(name) for key in known)]
        put_table("export.md", "export_engines.py", table(known, measured))


if __name__ == "__main__":
    main()
