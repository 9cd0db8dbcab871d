"""Each engine runs what was exported for it as PyTorch does; engines that are not installed are skipped."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import refold
from refold.errors import InputError
from refold.export import FORMATS, ExportReport, get_engine, installed_engines
from refold.export import engines as engines_module
from refold.folding import count

IMAGE = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
SMALL = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def needs(engine: str) -> Any:
    return pytest.mark.skipif(
        engine not in installed_engines(), reason=f"install it with: pip install {FORMATS[engine].install}"
    )


def engines(*names: str) -> list[Any]:
    return [pytest.param(name, marks=needs(name)) for name in names]


# All that convert and run within a second or two; the others have their tests below.
QUICK = engines("openvino", "ncnn", "mnn")


@pytest.fixture(scope="module")
def plain(randomised: Callable[[nn.Module], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return refold.fold(randomised(refold.create_model("repghostnet_050", num_classes=5)), IMAGE, prove=False)


class Small(nn.Module):
    """Convolutions of three kinds, a gate, a concatenation and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1), nn.Hardsigmoid())
        self.classifier = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = torch.cat([self.depthwise(x), self.grouped(x)], dim=1)
        return self.classifier((x * self.gate(x)).mean(dim=(2, 3)))


def small_network() -> nn.Module:
    torch.manual_seed(3)
    return Small().eval()


def write_small(tmp_path: Path, engine: str, **options: Any) -> tuple[Path, ExportReport]:
    path = tmp_path / f"net{FORMATS[engine].suffix}"
    return path, refold.export(small_network(), path, SMALL, engine=engine, **options)


@pytest.mark.slow
@pytest.mark.parametrize("engine", QUICK)
def test_a_network_of_the_zoo(engine: str, plain: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / f"net{FORMATS[engine].suffix}"
    report = refold.export(plain, path, IMAGE, engine=engine)
    assert report.checked
    assert report.batch_sizes == [1, 3]
    assert report.relative_difference < 1e-4
    assert all(trial.same_top1 == trial.batch_size for trial in report.trials)
    session = get_engine(engine).open(path, threads=1)
    images = torch.rand(5, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(session(images)[0], plain(images), rtol=1e-3, atol=1e-4)
    convolutions = sum(n for kind, n in report.contents.operators.items() if "onv" in kind)
    # MNN makes the classifier a convolution as well.
    assert convolutions == count(plain, IMAGE).convolutions + (engine == "mnn")
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) == report.bytes


@pytest.mark.parametrize("engine", QUICK)
def test_normalization_and_softmax_in_half_precision(engine: str, tmp_path: Path) -> None:
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    path, report = write_small(tmp_path, engine, normalize=(mean, std), softmax=True, half=True)
    assert report.half
    assert 1e-6 < report.relative_difference < 5e-2, "float16 is seen, and is close"
    pixels = torch.rand(2, 3, 16, 16)
    normalized = (pixels - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    with torch.no_grad():
        expected = small_network()(normalized).softmax(dim=1)
    result = get_engine(engine).open(path)(pixels)[0]
    assert torch.allclose(result, expected, atol=5e-3)
    assert torch.allclose(result.sum(dim=1), torch.ones(2), atol=1e-3)


@pytest.mark.parametrize("engine", [*engines("onnxruntime"), *QUICK])
def test_class_names_and_preprocessing_go_with_the_file(
    engine: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    network: Any = small_network()
    network.pretrained_cfg = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "input_size": (3, 16, 16)}
    path = tmp_path / f"net{FORMATS[engine].suffix}"
    names = ["ä", "b", "c", "d"]
    refold.export(network, path, SMALL, engine=engine, class_names=names, dynamic_batch=False)
    metadata = get_engine(engine).read_metadata(path)
    assert json.loads(metadata["class_names"]) == names
    assert json.loads(metadata["preprocessing"])["mean"] == [0.4, 0.5, 0.6]
    assert (metadata["form"], metadata["output"]) == ("plain", "logits")
    assert capfd.readouterr().out == ""


@needs("openvino")
def test_openvino_counts_what_it_holds(tmp_path: Path) -> None:
    import openvino

    path, report = write_small(tmp_path, "openvino", dynamic_batch=False)
    cost = count(small_network(), SMALL)
    assert (report.contents.parameters, report.contents.macs) == (cost.parameters, cost.macs)
    model = openvino.Core().read_model(path)
    assert list(model.input(0).get_partial_shape()) == [1, 3, 16, 16]


@pytest.mark.parametrize("engine", [*engines("onnxruntime"), *QUICK])
def test_gelu_is_not_approximated(engine: str, tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.GELU()).eval()
    path = tmp_path / f"net{FORMATS[engine].suffix}"
    report = refold.export(network, path, 3 * SMALL, engine=engine, dynamic_batch=False)
    assert report.relative_difference < 1e-5


@needs("mnn")
def test_mnn_rounds_its_half_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(24) for layer in (nn.Conv2d(16, 16, 1), nn.ReLU())]
    for layer in layers[::2]:
        layer.weight.data.abs_()
    path = tmp_path / "net.mnn"
    report = refold.export(
        nn.Sequential(*layers), path, torch.rand(1, 16, 4, 4), engine="mnn", half=True, fold=False
    )
    assert 0 < report.relative_difference < 1e-3, "cut off, 24 layers of positive weights lose 6e-3"


@needs("ncnn")
def test_ncnn_keeps_half_weights_that_are_nearly_subnormal(tmp_path: Path) -> None:
    network = nn.Conv2d(64, 4, 1, bias=False)
    with torch.no_grad():
        network.weight.copy_(torch.rand(4, 64, 1, 1, generator=torch.Generator().manual_seed(0)) * 6e-5)
    image, path = torch.rand(1, 64, 4, 4), tmp_path / "net.param"
    refold.export(network, path, image, engine="ncnn", half=True, tolerance=100.0)
    with torch.no_grad():
        expected = network(image)
    difference = get_engine("ncnn").open(path)(image)[0] - expected
    assert difference.abs().max() < 0.3 * expected.abs().max(), "were they zero, it would be all of it"


@pytest.mark.slow
@needs("litert")
def test_litert_takes_the_pixels_and_keeps_the_metadata_of_half_precision(tmp_path: Path) -> None:
    from refold.export.litert import read_metadata

    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 64, 1), nn.Upsample((7, 7)), nn.Conv2d(64, 4, 3)).eval()
    for half in (False, True):
        path = tmp_path / "net.tflite"
        report = refold.export(
            network, path, torch.randn(1, 3, 3, 3), engine="litert", half=half, class_names=list("abcd")
        )
        assert report.relative_difference < (5e-3 if half else 1e-5)
        assert json.loads(read_metadata(path)["class_names"]) == list("abcd")


@needs("coreml")
def test_a_package_that_only_macos_runs_says_that_it_was_not_checked(tmp_path: Path) -> None:
    import sys

    if sys.platform == "darwin":
        pytest.skip("this machine runs Core ML")
    path, report = write_small(tmp_path, "coreml", class_names=list("abcd"), half=True)
    assert not report.checked
    assert any("not compared with PyTorch" in note for note in report.notes)
    assert report.to_dict()["max_difference"] is None
    assert report.contents.operators["conv"] == 4
    module: Any = get_engine("coreml")
    assert json.loads(module.read_metadata(path)["class_names"]) == list("abcd")
    write_small(tmp_path, "coreml")
    assert "class_names" not in module.read_metadata(path), "the package was replaced"
    assert [file.name for file in tmp_path.iterdir()] == ["net.mlpackage"]


@needs("ncnn")
def test_ncnn_says_what_it_cannot(tmp_path: Path) -> None:
    _, report = write_small(tmp_path, "ncnn")
    assert report.relative_difference < 1e-4
    assert report.batch_sizes == [1, 3]
    assert any("one image a call" in note for note in report.notes)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["net.bin", "net.param", "net.param.json"]
    with pytest.raises(InputError, match=r"export model\.float\(\), with half=True"):
        refold.export(Small().half(), tmp_path / "x.param", SMALL.half(), engine="ncnn", fold=False)


def test_an_engine_that_is_not_installed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines_module, "find_spec", lambda name: None)
    assert installed_engines() == []
    with pytest.raises(InputError, match=r"ncnn and pnnx is not installed.*pip install 'refold\[ncnn\]'"):
        get_engine("ncnn")


def test_what_a_converter_says_is_passed_on(tmp_path: Path) -> None:
    import sys

    from refold.export.converting import run_converter

    def script(text: str) -> list[str]:
        return [sys.executable, "-c", text]

    written = tmp_path / "file"
    with pytest.raises(InputError, match="Abacus cannot convert the model: no beads"):
        run_converter(script("import sys; print('one'); sys.exit('no beads.')"), "Abacus", written)
    with pytest.raises(InputError, match="it crashed with SIGSEGV"):
        run_converter(script("import os; os.kill(os.getpid(), 11)"), "Abacus", written)
    with pytest.raises(InputError, match="it ended with code 0 and no message"):
        run_converter(script(""), "Abacus", written)


class TwoOutputs(Small):
    """A network of two outputs."""

    def forward(self, x: Tensor) -> Any:
        features = self.stem(x).relu()
        return features.mean(dim=(2, 3)), features.flatten(1)


def port_names_of(path: Path) -> tuple[list[str], list[str]]:
    """What the inputs and the outputs are called, asked of the engine's own interface."""
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return [v.name for v in session.get_inputs()], [v.name for v in session.get_outputs()]
    if path.suffix == ".xml":
        import openvino

        model = openvino.Core().read_model(path)
        return [v.any_name for v in model.inputs], [v.any_name for v in model.outputs]
    if path.suffix == ".param":
        import ncnn

        net = ncnn.Net()
        net.load_param(str(path))
        return list(net.input_names()), list(net.output_names())
    if path.suffix == ".mnn":
        import MNN

        info = MNN.nn.load_module_from_file(str(path), [], []).get_info()
        return list(info["inputNames"]), list(info["outputNames"])
    if path.suffix == ".mlpackage":
        import coremltools

        description = coremltools.utils.load_spec(str(path)).description
        return [v.name for v in description.input], [v.name for v in description.output]
    from ai_edge_litert.interpreter import Interpreter

    (signature,) = Interpreter(str(path)).get_signature_list().values()
    return sorted(signature["inputs"]), sorted(signature["outputs"])


@pytest.mark.parametrize(
    "engine",
    [
        *engines("onnxruntime"),
        *QUICK,
        *(pytest.param(p.values[0], marks=[*p.marks, pytest.mark.slow]) for p in engines("litert", "coreml")),
    ],
)
def test_inputs_and_outputs_have_fixed_names(engine: str, tmp_path: Path) -> None:
    path, _ = write_small(tmp_path, engine)
    assert port_names_of(path) == (["image"], ["output"])
    two = tmp_path / f"two{FORMATS[engine].suffix}"
    refold.export(TwoOutputs(), two, SMALL, engine=engine)
    assert port_names_of(two) == (["image"], ["output_0", "output_1"])


@needs("openvino")
def test_a_session_let_go_in_another_thread_leaves_the_process_alive(tmp_path: Path) -> None:
    """OpenVINO took the stack for signals away with its last session: the next child to end, ended the process."""
    path, _ = write_small(tmp_path, "openvino")
    script = f"""
import faulthandler, gc, signal, subprocess, sys, threading
from pathlib import Path
faulthandler.enable()
from refold.export.opening import open_exported
held = [open_exported(Path({str(path)!r}))]
def let_go():
    held.clear()
    gc.collect()
thread = threading.Thread(target=let_go)
thread.start()
thread.join()
signal.signal(signal.SIGCHLD, lambda *_: print("a child ended"))
subprocess.run([sys.executable, "-c", ""])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split("\n")[-2]) == (0, "a child ended"), done.stderr
