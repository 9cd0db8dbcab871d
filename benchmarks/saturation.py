"""One layer as three int8 files, in the engine and in float arithmetic, from the reports of `refold.quantize` alone.

    [ONEDNN_MAX_CPU_ISA=AVX2] python benchmarks/saturation.py [--engine openvino]

A 1x1 convolution of 64 channels with normal weights, behind ReLU6. Processors without a dot product of bytes add two
products in 16 bits: what then leaves them shows as a difference between the columns, which `refold.quantize` refuses.
OpenVINO computes as they do where the variable says so, on any x86 processor.
"""

from __future__ import annotations

import argparse
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import refold

SUFFIXES = {"onnxruntime": ".onnx", "openvino": ".xml"}
FILES = {
    "8 bits, scales by the largest weight": {"cpu": "vnni"},
    "7 bits": {"cpu": "vnni", "bits": 7},
    "8 bits, scales by the largest pair": {"cpu": "any"},
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=SUFFIXES, default="onnxruntime")
    engine = parser.parse_args().engine
    torch.manual_seed(0)
    torch.set_num_threads(1)
    layer = nn.Conv2d(64, 64, 1, bias=False)
    nn.init.normal_(layer.weight)
    images = (4 + 4 * torch.randn(64, 64, 16, 16)).clamp(0, 6)
    table, refusals = Table(), []
    for title in ("file", "engine, dB", "float arithmetic, dB", "channels that could saturate"):
        table.add_column(title, justify="left" if title == "file" else "right")
    with TemporaryDirectory() as folder:
        for title, settings in FILES.items():
            config = refold.QuantizationConfig(**settings)  # type: ignore[arg-type]  # texts and numbers
            try:
                path = f"{folder}/layer{SUFFIXES[engine]}"
                report = refold.quantize(layer.eval(), path, images, engine=engine, config=config)
            except refold.NotEquivalent as refusal:
                table.add_row(title, "refused")
                refusals.append(f"{title}: {refusal}")
                continue
            near = report.agreement.decibels
            table.add_row(
                title, f"{near:.1f}", f"{near + report.engine_gap:.1f}", str(report.saturating_channels)
            )
    Console(width=120).print(table, *refusals, sep="\n")


if __name__ == "__main__":
    main()
