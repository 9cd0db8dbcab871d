"""Every snippet of docs/deployment.md gives what `refold predict` gives; what cannot run here is skipped."""

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import refold
from refold.export import FORMATS, installed_engines
from refold.training.predicting import network_classifier

PAGE = Path(__file__).parent.parent / "docs" / "deployment.md"
NAMES = ["ant", "bée", "cat", "dog", "elk", "fox"]
PREPROCESSING = {
    "input_size": [3, 32, 32], "interpolation": "bicubic", "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.3],
    "crop_pct": 0.875,
}  # fmt: skip
BAKED = [(False, False), (True, False), (False, True), (True, True)]


def snippets() -> dict[str, str]:
    """The marked snippets of the page by name."""
    found = re.findall(
        r"<!-- snippet: (\S+) -->\n```\w+\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL
    )
    assert len(found) == len(dict(found))
    return dict(found)


class Tiny(nn.Module):
    """A classifier that every engine converts in a second or two."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.classifier = nn.Linear(8, 6)
        nn.init.normal_(self.classifier.weight, std=4.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.stem(x).relu().mean(dim=(2, 3)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A network and a picture, also as raw pixels of the network's size, and the snippet that others import."""
    refold.save(Tiny(), tmp_path / "net.safetensors", class_names=NAMES, preprocessing=PREPROCESSING)
    # Smooth, for a decoder may differ in a bit.
    slope = (
        np.linspace(0, 255, 60)[None, :, None] * np.array([1.0, 0.6, 0.2])
        + np.linspace(0, 60, 48)[:, None, None]
    )
    Image.fromarray(slope.clip(0, 255).astype(np.uint8)).save(tmp_path / "photo.jpg", quality=95)
    (tmp_path / "prepare.py").write_text(snippets()["prepare.py"], encoding="utf-8")
    (tmp_path / "names.txt").write_text("\n".join(NAMES), encoding="utf-8")
    return tmp_path


def export(folder: Path, engine: str, *, normalize: bool = True, softmax: bool = True) -> None:
    """Write the network for an engine as ``net`` with the engine's suffix."""
    if engine not in installed_engines():
        pytest.skip(f"install it with: pip install {FORMATS[engine].install}")
    net, path = refold.load(folder / "net.safetensors", Tiny), folder / f"net{FORMATS[engine].suffix}"
    refold.export(net, path, torch.rand(1, 3, 32, 32), engine=engine, normalize=normalize, softmax=softmax)


def expected(folder: Path, name: str = "photo.jpg") -> list[tuple[str, float]]:
    """What refold says of a picture, in percent."""
    predictor = network_classifier(refold.load(folder / "net.safetensors", Tiny))
    (prediction,) = predictor.predict([folder / name])
    return [(name, 100 * share) for name, share in prediction.classes]


def said(folder: Path, *command: str) -> list[tuple[str, float]]:
    """What a program prints: names or numbers of classes, and percent."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    pairs = [line.rsplit(": ", 1) for line in done.stdout.splitlines() if line.endswith("%")]
    return [(name, float(share.rstrip("%"))) for name, share in pairs]


def run_python(folder: Path, name: str) -> list[tuple[str, float]]:
    """Run a Python snippet without refold."""
    text = snippets()[name]
    assert "import refold" not in text
    (folder / f"snippet_{name}").write_text(text, encoding="utf-8")
    return said(folder, sys.executable, "-X", "utf8", f"snippet_{name}")


def assert_same(found: list[tuple[str, float]], right: list[tuple[str, float]]) -> None:
    assert [name for name, _ in found] == [name for name, _ in right]
    assert [share for _, share in found] == pytest.approx([share for _, share in right], abs=0.02)


@pytest.mark.parametrize(("normalize", "softmax"), BAKED)
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino", "ncnn"])
def test_python(engine: str, normalize: bool, softmax: bool, folder: Path) -> None:
    export(folder, engine, normalize=normalize, softmax=softmax)
    right = expected(folder)
    assert right[0][1] < 90, "a second softmax would be seen"
    assert_same(run_python(folder, f"{engine}.py"), right)


@pytest.mark.slow
def test_litert(folder: Path) -> None:
    export(folder, "litert")
    assert_same(run_python(folder, "litert.py"), expected(folder))


@pytest.fixture
def pixels(folder: Path) -> Path:
    """The middle of the picture as it is, for programs that are given the pixels: PPM, RGBA and PNG."""
    image = Image.open(folder / "photo.jpg").crop((0, 0, 32, 32))
    image.save(folder / "photo.ppm")
    (folder / "photo.rgba").write_bytes(image.convert("RGBA").tobytes())
    # Enlarged as much as it is cropped again, a picture of one size would change; so nothing is cropped.
    net = refold.load(folder / "net.safetensors", Tiny)
    refold.save(net, folder / "net.safetensors", preprocessing={**PREPROCESSING, "crop_pct": 1.0})
    image.save(folder / "pixels.png")
    export(folder, "onnxruntime")
    return folder


def best_number(folder: Path) -> list[tuple[str, float]]:
    """The likeliest class by its number."""
    name, share = expected(folder, "pixels.png")[0]
    return [(str(NAMES.index(name)), share)]


def test_cpp(pixels: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++")
    header = ["-fsyntax-only", "-x", "c++", "-include", "onnxruntime_cxx_api.h", "/dev/null"]
    if subprocess.run([compiler, *header], capture_output=True, check=False).returncode:
        pytest.skip("g++ does not find onnxruntime_cxx_api.h; name its folder in CPLUS_INCLUDE_PATH")
    spec = find_spec("onnxruntime")
    assert spec is not None
    assert spec.origin is not None
    (library,) = (Path(spec.origin).parent / "capi").glob("libonnxruntime.so.*")
    (pixels / "classify.cpp").write_text(snippets()["classify.cpp"], encoding="utf-8")
    # The name under which the library asks to be found.
    (pixels / "libonnxruntime.so.1").symlink_to(library)
    link = ["libonnxruntime.so.1", "-Wl,-rpath,$ORIGIN", "-o", "classify"]
    subprocess.run([compiler, "-std=c++17", "-Wall", "classify.cpp", *link], cwd=pixels, check=True)
    assert_same(said(pixels, "./classify"), best_number(pixels))


def test_javascript(pixels: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no node")
    found = subprocess.run(
        [node, "-p", "require.resolve('onnxruntime-node')"], capture_output=True, text=True, check=False
    )
    if found.returncode:
        pytest.skip("node does not find onnxruntime-node; npm install it, and name its folder in NODE_PATH")
    # Modules are looked up beside the script alone, whatever NODE_PATH says.
    folder = next(parent for parent in Path(found.stdout.strip()).parents if parent.name == "node_modules")
    (pixels / "node_modules").symlink_to(folder)
    (pixels / "classify.mjs").write_text(snippets()["classify.mjs"], encoding="utf-8")
    assert_same(said(pixels, node, "classify.mjs"), best_number(pixels))


def test_the_page_names_what_the_files_say(folder: Path) -> None:
    import onnx

    export(folder, "onnxruntime")
    page = PAGE.read_text(encoding="utf-8")
    model = onnx.load(folder / "net.onnx")
    for entry in model.metadata_props:
        assert f"`{entry.key}`" in page
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["image", "output"]
    assert {
        "prepare.py",
        "onnxruntime.py",
        "openvino.py",
        "ncnn.py",
        "litert.py",
        "classify.cpp",
        "classify.mjs",
    } == set(snippets())
