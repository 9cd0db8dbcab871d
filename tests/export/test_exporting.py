"""Exported files compute what PyTorch computes, at any batch size, or are not there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import refold
from refold.errors import InputError, NotEquivalent
from refold.export import Contents, ExportReport, Request, checked, get_engine
from refold.folding import count

IMAGE = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def net(randomised: Callable[[nn.Module], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return randomised(refold.create_model("repghostnet_050", num_classes=5))


@pytest.fixture(scope="module")
def exported(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExportReport]:
    path = tmp_path_factory.mktemp("exported") / "net.onnx"
    return path, refold.export(net, path, IMAGE)


def test_export_folds_and_keeps_the_batch_dynamic(
    net: nn.Module, exported: tuple[Path, ExportReport]
) -> None:
    path, report = exported
    assert report.form == "plain"
    assert "BatchNormalization" not in report.contents.operators
    assert report.batch_sizes == [1, 3]
    assert report.bytes == path.stat().st_size
    assert 0 <= report.max_difference <= 1e-4 * report.spread
    assert onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    session = get_engine("onnxruntime").open(path, threads=1)
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, 48, 48)
        with torch.no_grad():
            expected = net(images)
        assert torch.allclose(session(images)[0], expected, rtol=1e-4, atol=1e-5)
    assert [file.name for file in path.parent.iterdir()] == ["net.onnx"]


def test_contents_equal_the_plain_network(net: nn.Module, exported: tuple[Path, ExportReport]) -> None:
    cost = count(refold.fold(net, IMAGE, prove=False), IMAGE)
    contents = exported[1].contents
    assert (contents.parameters, contents.macs) == (cost.parameters, cost.macs)
    assert contents.operators["Conv"] == cost.convolutions
    assert contents.operator_count == cost.operator_count


def test_a_file_is_the_same_however_it_came_about_and_names_no_path_of_the_machine(
    net: nn.Module, exported: tuple[Path, ExportReport], tmp_path: Path
) -> None:
    def elsewhere() -> None:
        refold.export(net, tmp_path / "again.onnx", IMAGE)

    elsewhere()
    content = (tmp_path / "again.onnx").read_bytes()
    assert content == exported[0].read_bytes()
    assert str(Path(torch.__file__).parent).encode() not in content
    assert str(Path(refold.__file__).parent).encode() not in content


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_file_for_images_of_any_size_tells_no_macs(engine: str, tmp_path: Path) -> None:
    pytest.importorskip(engine)
    layer, path = nn.Conv2d(3, 4, 3).eval(), tmp_path / f"x.{'onnx' if engine == 'onnxruntime' else 'xml'}"
    image = torch.randn(1, 3, 12, 10)
    fixed = refold.export(layer, path, image, engine=engine)
    assert fixed.contents.macs == 10 * 8 * 4 * 27
    free = refold.export(layer, path, image, engine=engine, dynamic_size=True)
    assert (free.contents.macs, free.contents.parameters) == (None, 4 * 28)


def test_branches_stay_if_asked_for(net: nn.Module, tmp_path: Path) -> None:
    net.train()
    report = refold.export(net, tmp_path / "x.onnx", IMAGE, fold=False, dynamic_batch=False)
    assert net.training, "the argument is left as it was"
    net.eval()
    assert report.form == "training"
    assert report.batch_sizes == [1]
    assert report.contents.operators["Add"] == 48  # 32 sums of branches and 16 shortcuts
    assert onnx.load(tmp_path / "x.onnx").graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1


class TwoInputs(nn.Module):
    """Two inputs, one of them integers, an input overwritten in place, and nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.matrix = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor, index: Tensor) -> dict[str, Any]:
        x = x.relu_() + self.embedding(index)
        return {"sum": x, "more": [x.mean(dim=1), x @ self.matrix]}


def test_several_inputs_and_nested_outputs(tmp_path: Path) -> None:
    arguments = (torch.randn(2, 3, 4), torch.tensor([[1, 2, 3], [4, 5, 6]]))
    before = arguments[0].clone()
    report = refold.export(TwoInputs(), tmp_path / "x.onnx", arguments)
    assert report.batch_sizes == [1, 2, 4]
    assert torch.equal(arguments[0], before)
    contents = report.contents
    assert (contents.parameters, contents.macs) == (10 * 4 + 4 * 6, 3 * 6 * 4)


def test_half_precision(tmp_path: Path) -> None:
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).half()
    report = refold.export(layers, tmp_path / "x.onnx", torch.randn(1, 3, 8, 8).half())
    assert report.relative_difference <= 1e-2
    with pytest.raises(InputError, match=r"float32|converted"):
        refold.export(layers.bfloat16(), tmp_path / "y.onnx", torch.randn(1, 3, 8, 8).bfloat16())
    assert [file.name for file in tmp_path.iterdir()] == ["x.onnx"]


def test_the_layout_of_the_example_leaves_no_trace(tmp_path: Path) -> None:
    layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    image = torch.randn(1, 3, 8, 8).to(memory_format=torch.channels_last)
    report = refold.export(layers, tmp_path / "x.onnx", image, dynamic_batch=False)
    assert set(report.contents.operators) <= {"Conv", "Relu", "GlobalAveragePool", "ReduceMean"}


class OtherEngine:
    """An engine whose answers are off."""

    def __init__(self, error: float) -> None:
        self.error = error

    def write(self, model: nn.Module, request: Request) -> list[str]:
        request.path.write_text("something")
        request.path.with_suffix(".more").write_text("something beside it")
        self.model = model
        return ["a note"]

    def contents(self, path: Path) -> Contents:
        return Contents(None, None, {})

    def open(self, path: Path, *, threads: int | None = None) -> Any:
        return lambda x: [self.model(x) + self.error]


def use(engine: OtherEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an engine that only this process knows write and run what is exported."""
    monkeypatch.setattr(checked, "get_engine", lambda name: engine)
    monkeypatch.setattr(
        checked, "run_apart", lambda _, path, calls: [engine.open(path)(*arguments) for arguments in calls]
    )


@pytest.mark.parametrize("error", [1e-2, float("nan"), float("inf")])
def test_an_engine_that_differs_leaves_no_file(
    error: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = nn.Conv2d(3, 3, 1)
    (tmp_path / "old.onnx").write_text("the last good one")
    use(OtherEngine(error), monkeypatch)
    with pytest.raises(NotEquivalent, match=r"discarded: ONNX Runtime differs from PyTorch"):
        refold.export(layer, tmp_path / "old.onnx", IMAGE)
    assert (tmp_path / "old.onnx").read_text() == "the last good one"
    assert len(list(tmp_path.iterdir())) == 1
    use(OtherEngine(0.0), monkeypatch)
    report = refold.export(layer, tmp_path / "old.onnx", IMAGE)
    assert report.max_difference == 0
    assert report.notes == ["a note"]
    assert report.bytes == len("something") + len("something beside it")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["old.more", "old.onnx"]


class FixedBatch(nn.Module):
    """A network that only takes pairs."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 12).relu()


def test_bad_input_is_one_sentence(net: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    with pytest.raises(InputError, match=r"There is no engine 'tensorflow'; choose one of: .*onnxruntime"):
        refold.export(net, path, IMAGE, engine="tensorflow")
    with pytest.raises(InputError, match=r"cannot run on .*shape \(?1"):
        refold.export(net, path, torch.randn(1, 4, 48, 48))
    with pytest.raises(InputError, match="dynamic_batch=False if its batch size is fixed"):
        refold.export(FixedBatch(), path, torch.randn(2, 3, 4))
    with pytest.raises(InputError, match="does not exist; create it first"):
        refold.export(net, tmp_path / "missing" / "x.onnx", IMAGE)
    assert list(tmp_path.iterdir()) == []
    assert refold.export(FixedBatch(), path, torch.randn(2, 3, 4), dynamic_batch=False).batch_sizes == [2]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_network_whose_outputs_are_not_finite_is_refused(value: float, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with torch.no_grad():
        net[0].weight[2] = value
    with pytest.raises(
        InputError, match=r"gives 1 of 4 values of output 0 as NaN or infinity \(inputs: the example"
    ):
        refold.export(net, tmp_path / "x.onnx", IMAGE)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_shape_than_was_asked_for_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """PyTorch may fall back to a way of converting that fixes the batch, and says nothing of it."""
    export = torch.onnx.export

    def fixed(*arguments: Any, **options: Any) -> Any:
        return export(*arguments, **{**options, "dynamic_shapes": None})

    monkeypatch.setattr(torch.onnx, "export", fixed)
    layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    with pytest.raises(
        InputError, match=r"'image' should be any x 3 x 8 x 8 and was written as 2 x 3 x 8 x 8"
    ):
        refold.export(layers, tmp_path / "x.onnx", torch.randn(1, 3, 8, 8))
    assert not list(tmp_path.iterdir())
    refold.export(layers, tmp_path / "x.onnx", torch.randn(1, 3, 8, 8), dynamic_batch=False)


def test_the_free_axis_has_one_name(tmp_path: Path) -> None:
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()
    refold.export(layers, tmp_path / "x.onnx", torch.randn(1, 3, 8, 8), fold=False)
    graph = onnx.load(tmp_path / "x.onnx").graph
    for value in (*graph.input, *graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
