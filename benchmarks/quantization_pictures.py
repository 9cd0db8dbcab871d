"""The pictures of docs/quantize.md, drawn from reports of `refold.quantize` and from a folded RepVGG.

    python benchmarks/quantization_pictures.py --photos imagenet1k-sample.tar --repvgg runs/quantization/small_repvgg

The distances are those of EfficientNet-Lite0 (`quantization.py` says how it is prepared) on 40 photos.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib
import torch
from matplotlib.figure import Figure

import refold
from refold.folding.fold import apply_passes
from refold.folding.identities import identities_out

sys.path.append(str(Path(__file__).resolve().parent))
import quantization
import quantization_networks  # noqa: F401  # registers the networks

DOCS = Path(__file__).resolve().parents[1] / "docs"
# What is turned off for the line before.
WITHOUT = {"rotate": False, "correct_bias": False, "round_together": False, "clip_ranges": False}
BEFORE, AFTER = "#b45309", "#1d4ed8"


def draw_distances(photos: Path) -> None:
    """The distance of each layer from the float network, before and after."""
    network, mean, std = quantization.efficientnet_lite0()
    pixels = quantization.read_photos(photos)[::25]
    images = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    for title, colour, settings in (
        ("scales by range, nearest integers", BEFORE, WITHOUT),
        ("refold.quantize", AFTER, {}),
    ):
        with TemporaryDirectory() as folder:
            config = refold.QuantizationConfig(keep_identity="never", **settings)  # type: ignore[arg-type]
            report = refold.quantize(network, Path(folder) / "net.onnx", images, config=config)
        distances = [layer.decibels for layer in report.layers]
        label = f"{title}: {report.agreement.decibels:.1f} dB at the output"
        axes.plot(
            range(1, len(distances) + 1), distances, marker="o", markersize=3, color=colour, label=label
        )
    axes.set_xlabel("layer, in the order they run")
    axes.set_ylabel("signal to noise, dB")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(DOCS / "quantize-layers.svg", metadata={"Date": None})


def draw_weights(run: Path) -> None:
    """The weights of a folded block with its diagonal, and without."""
    plain = refold.fold(refold.load(run / "training.safetensors"), torch.randn(1, 3, 32, 32))
    split = apply_passes(plain, torch.randn(1, 3, 32, 32), [identities_out], may_cost=True)
    kernels = {name: m.weight for name, m in plain.named_modules() if isinstance(m, torch.nn.Conv2d)}
    path = split.fold_report.regions[0].path
    weight = next(kernel for name, kernel in kernels.items() if name.startswith(path)).detach()
    rest = weight.clone()
    rest[:, :, 1, 1].diagonal().zero_()
    figure = Figure(figsize=(8, 3), layout="constrained")
    for axes, title, values, colour in zip(
        figure.subplots(1, 2, sharey=True),
        ("the folded kernel", "without its diagonal"),
        (weight, rest),
        (BEFORE, AFTER),
        strict=True,
    ):
        flat = values.flatten().double()
        kurtosis = float(((flat - flat.mean()) ** 4).mean() / flat.var(correction=0) ** 2 - 3)
        axes.hist(flat.numpy(), bins=120, color=colour, log=True)
        axes.set_title(f"{title}: excess kurtosis {kurtosis:.0f}", fontsize=10)
        axes.set_xlabel("weight")
    figure.savefig(DOCS / "quantize-weights.svg", metadata={"Date": None})


def main() -> None:
    """Draw both."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--repvgg", type=Path, required=True)
    parsed = parser.parse_args()
    matplotlib.rcParams["svg.hashsalt"] = "refold"
    torch.set_num_threads(1)
    draw_weights(parsed.repvgg)
    draw_distances(parsed.photos)


if __name__ == "__main__":
    main()
