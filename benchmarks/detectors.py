"""Detectors side by side in an engine: backbones in two heads, and light detectors beside torchvision's SSDLite.

Usage: python benchmarks/detectors.py [--engines NAME ...] [--groups NAME ...] [--rounds N] [--results FILE] [--write]

All networks of a group take turns, one image, one thread; the ratio to the group's first row is the median over the
rounds. Maps alone are timed where a row says so, else boxes with all that leads to them. Weights are drawn, so that
nearly nothing is above the threshold: suppression is timed on as many boxes as it is given (a threshold of 0 keeps
all). FILE keeps what was measured; a run that is called again measures what is missing.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import refold
from pages import put_table
from refold.bench import measure_latency
from refold.export import get_engine

BACKBONES = ("ghostnet_110", "repghostnet_111", "mobilenetv2_100", "mobilenetv3_large_100")
ENGINES = {"onnxruntime": "onnx", "openvino": "xml"}
SSDLITE = "torchvision's SSDLite320-MobileNetV3"


class SSDLite(nn.Module):
    """torchvision's detector without its list of images, resizing, choice of boxes and suppression: images to maps."""

    def __init__(self) -> None:
        super().__init__()
        whole = torchvision.models.detection.ssdlite320_mobilenet_v3_large(
            weights=None, weights_backbone=None
        )
        self.backbone, self.head = whole.backbone, whole.head

    def forward(self, images: Tensor) -> list[Tensor]:
        found = self.head(list(self.backbone(images).values()))
        return [found["bbox_regression"], found["cls_logits"]]


class Suppressed(nn.Module):
    """torchvision's SSDLite to boxes: the best pairs of a box and a class, and suppression, as refold has them."""

    needs_suppression = True

    def __init__(self) -> None:
        super().__init__()
        self.maps = SSDLite().eval()
        generator = torchvision.models.detection.anchor_utils.DefaultBoxGenerator(
            [[2, 3]] * 6, min_ratio=0.2, max_ratio=0.95
        )
        images = torchvision.models.detection.image_list.ImageList(torch.zeros(1, 3, 320, 320), [(320, 320)])
        with torch.no_grad():
            anchors = generator(images, list(self.maps.backbone(images.tensors).values()))
        self.register_buffer("anchors", anchors[0])

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.maps(images)

    def decode(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        deltas, logits = maps
        weights = deltas.new_tensor((10.0, 10.0, 5.0, 5.0))
        return logits.softmax(-1)[..., 1:], refold.boxes.boxes_from_deltas(deltas / weights, self.anchors)


def group(name: str) -> tuple[int, dict[str, nn.Module]]:
    """The side of the images of a group and its networks by the names of their rows."""
    if name in ("yolov3", "retinanet"):
        side = {"yolov3": 416, "retinanet": 800}[name]
        return side, {f"{name}/{each}": plain(f"{name}/{each}", side) for each in BACKBONES}
    rows: dict[str, nn.Module] = {SSDLITE: refold.fold(drawn(SSDLite()), image(320), prove=False)}
    whole = refold.fold(drawn(Suppressed()), image(320), prove=False)
    rows[f"{SSDLITE}, boxes, suppressed"] = refold.detections(whole, threshold=0.0)
    for each in ("repghostnet_100", "mobilenetv3_large_100"):
        net = plain(f"dense/{each}", 320)
        rows[f"dense/{each}"] = net
        rows[f"dense/{each}, boxes"] = refold.detections(net, threshold=0.0)
        rows[f"dense/{each}, boxes, suppressed"] = refold.detections(net, threshold=0.0, suppress=True)
    return 320, rows


def plain(name: str, side: int) -> nn.Module:
    """A network with 80 classes, folded; not proved here, for the tests do."""
    return refold.fold(drawn(refold.create_model(name, num_classes=80)), image(128), prove=False)


def drawn(net: nn.Module) -> nn.Module:
    """The network with predictions of all sizes, so that which boxes are the best is no matter of rounding."""
    torch.manual_seed(0)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=(2 / layer.weight[0].numel()) ** 0.5)
            if layer.bias is not None:
                nn.init.uniform_(layer.bias, -2, 1)
    return net.eval()


def image(side: int) -> Tensor:
    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))


def measure(name: str, engine: str, rounds: int) -> dict[str, Any]:
    """Milliseconds of every row of a group, and the ratio to the first: medians over the rounds."""
    side, networks = group(name)
    calls: dict[str, Callable[[], Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (row, network) in enumerate(networks.items()):
            path = Path(folder) / f"{number}.{ENGINES[engine]}"
            refold.export(network, path, image(side), engine=engine, dynamic_batch=False)
            calls[row] = partial(get_engine(engine).open(path, threads=1), image(side))
        latencies = measure_latency(calls, rounds=rounds, threads=1)
    first = latencies[next(iter(calls))]
    return {row: {"ms": each.median, "ratio": each.ratio_to(first)} for row, each in latencies.items()}


def table(results: dict[str, Any]) -> str:
    engines = list(dict.fromkeys(key.split(" in ")[1] for key in results))
    lines = [
        "| one image, one thread | " + " | ".join(f"{engine} ms | ratio" for engine in engines) + " |",
        "|---|" + "--:|--:|" * len(engines),
    ]
    for name in dict.fromkeys(key.split(" in ")[0] for key in results):
        found = {engine: results.get(f"{name} in {engine}", {}) for engine in engines}
        for row in next(each for each in found.values() if each):
            cells = [
                f"{found[engine][row]['ms']:.1f} | {found[engine][row]['ratio']:.2f}"
                if found[engine]
                else " | "
                for engine in engines
            ]
            lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--engines", nargs="*", default=list(ENGINES))
    parser.add_argument("--groups", nargs="*", default=["yolov3", "light", "retinanet"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--results", type=Path, default=Path("detectors.json"))
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    settings = parser.parse_args()
    results = json.loads(settings.results.read_text()) if settings.results.is_file() else {}
    for name in settings.groups:
        for engine in settings.engines:
            key = f"{name} in {engine}"
            if key not in results:
                results[key] = measure(name, engine, 10 if name == "retinanet" else settings.rounds)
                settings.results.write_text(json.dumps(results, indent=1))
                print(key, json.dumps(results[key], indent=1), flush=True)
    if settings.write:
        put_table("benchmarks.md", "detectors.py", table(results))


if __name__ == "__main__":
    main()
