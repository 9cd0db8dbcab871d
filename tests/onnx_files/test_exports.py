"""Networks exported in training form fold to what folding the network and exporting that gives."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import timm
import torch
from graphs import LARGEST, answers, distance, kinds
from torch import Tensor, nn
from torch.torch_version import TorchVersion

import refold

# Without its converter of versions, PyTorch's newer exporter writes 18 where an older one is asked for.
VARIANTS = [("torchscript", 13), ("torchscript", 17), ("torchscript", 21), ("dynamo", 18), ("dynamo", 21)]
NETWORKS = ("repvgg_a0", "mobileone_s0", "ghostnetv3_100", "repghostnet_100", "fastvit_t8", "repvit_m0_9")


class DiverseBranch(nn.Module):
    """The diverse branch block: 3x3, 1x1, 1x1 before 3x3, 1x1 before an average, all with norms."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()

        def branch(*layers: nn.Module) -> nn.Sequential:
            return nn.Sequential(*layers, nn.BatchNorm2d(out_channels))

        square = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        first = nn.Sequential(
            nn.ZeroPad2d(1), nn.Conv2d(in_channels, in_channels, 1), nn.BatchNorm2d(in_channels)
        )
        self.branches = nn.ModuleList(
            [
                branch(square),
                branch(nn.Conv2d(in_channels, out_channels, 1, stride)),
                branch(first, nn.Conv2d(in_channels, out_channels, 3, stride)),
                branch(nn.ZeroPad2d(1), nn.Conv2d(in_channels, out_channels, 1), nn.AvgPool2d(3, stride)),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(sum(branch(x) for branch in self.branches))  # type: ignore[arg-type]  # of tensors


def export(net: nn.Module, path: Path, image: Tensor, exporter: str, opset: int) -> onnx.ModelProto:
    """Export in evaluation mode with a free batch, nothing folded or optimised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter == "dynamo":
            shapes = ({0: torch.export.Dim("batch")},)
            settings: dict[str, Any] = {"dynamic_shapes": shapes, "optimize": False, "verbose": False}
            program: Any = torch.onnx.export(
                net,
                (torch.cat([image, image]),),
                dynamo=True,
                opset_version=opset,
                **settings,
            )
            program.save(path)
        else:
            torch.onnx.export(
                net,
                (image,),
                str(path),
                dynamo=False,
                do_constant_folding=False,
                training=torch.onnx.TrainingMode.PRESERVE,
                opset_version=opset,
                input_names=["image"],
                dynamic_axes={"image": {0: "batch"}},
            )
    return onnx.load(path)


def _check(net: nn.Module, image: Tensor, variant: tuple[str, int], folder: Path) -> tuple[Any, Any, Any]:
    """The file, the file folded and the network folded and exported, which must hold as many layers."""
    if variant[0] == "dynamo" and TorchVersion(torch.__version__) < "2.9":
        pytest.skip("this exporter fails at batch norms before PyTorch 2.9")
    if variant == ("torchscript", 21) and TorchVersion(torch.__version__) < "2.7":
        pytest.skip("this exporter writes opsets up to 20 before PyTorch 2.7")
    plain = refold.fold(net, image)
    before = export(net, folder / "training.onnx", image, *variant)
    wanted = export(plain, folder / "module.onnx", image, *variant)
    report = refold.fold(folder / "training.onnx", folder / "plain.onnx", image)
    found = onnx.load(folder / "plain.onnx")
    onnx.checker.check_model(found, full_check=True)
    assert report.proof is not None
    assert report.proof.distance_float64 < LARGEST
    for kind in ("Conv", "BatchNormalization", "Gemm", "MatMul"):
        assert kinds(found)[kind] == kinds(wanted)[kind], kind
    assert len(found.graph.node) <= len(wanted.graph.node)
    assert found.graph.input == before.graph.input
    assert found.graph.output == before.graph.output
    return before, found, wanted


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v[0]}-{v[1]}")
def test_the_diverse_branch_block(
    variant: tuple[str, int], tmp_path: Path, randomised: Callable[[nn.Module], nn.Module]
) -> None:
    """Exported in float64, so that ONNX's reference implementation can say that not even rounding differs."""
    net = randomised(nn.Sequential(DiverseBranch(4, 6), DiverseBranch(6, 6, stride=2))).double()
    image = torch.randn(1, 4, 9, 11, dtype=torch.float64)
    before, found, _ = _check(net, image, variant, tmp_path)
    assert kinds(before)["Conv"] == 10
    assert kinds(found)["Conv"] == 2
    for batch in (1, 3):
        assert distance(before, found, [torch.randn(batch, 4, 9, 11).double().numpy()]) < LARGEST


# Every network by both exporters, one of them and the block above at every opset.
OF_NETWORKS = [
    *((name, variant) for name in (*NETWORKS, "repnext_u3_t") for variant in (VARIANTS[0], VARIANTS[-1])),
    *(("repvgg_a0", variant) for variant in VARIANTS[1:-1]),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "variant"), OF_NETWORKS, ids=lambda v: v if isinstance(v, str) else f"{v[0]}-{v[1]}"
)
def test_networks(
    name: str, variant: tuple[str, int], tmp_path: Path, randomised: Callable[[nn.Module], nn.Module]
) -> None:
    net = randomised(timm.create_model(name) if name in NETWORKS else refold.create_model(name))
    _, found, _ = _check(net, torch.randn(1, 3, 64, 64), variant, tmp_path)
    assert kinds(found)["BatchNormalization"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "variant"),
    [(name, (VARIANTS[0], VARIANTS[-1])[place % 2]) for place, name in enumerate(NETWORKS)],
    ids=lambda v: v if isinstance(v, str) else f"{v[0]}-{v[1]}",
)
def test_networks_by_the_reference_implementation(
    name: str, variant: tuple[str, int], tmp_path: Path, randomised: Callable[[nn.Module], nn.Module]
) -> None:
    """Exported in float64 and run by what knows nothing of refold, in float64 as well."""
    net = randomised(timm.create_model(name)).double()
    before, found, _ = _check(net, torch.randn(1, 3, 64, 64).double(), variant, tmp_path)
    images = [torch.randn(2, 3, 64, 64).double().numpy() for _ in range(2)]
    first, other = (answers(before, [image])[0] for image in images)
    assert abs(first - other).max() > 1e-3 * abs(first).max(), "the answer depends on the image"
    assert distance(before, found, images[:1]) < LARGEST


def test_a_file_that_was_optimised_already(
    tmp_path: Path, randomised: Callable[[nn.Module], nn.Module]
) -> None:
    """As PyTorch exports by default: norms in the convolutions, branches as they were."""
    net = randomised(nn.Sequential(DiverseBranch(3, 6), DiverseBranch(6, 6, stride=2)))
    image = torch.randn(1, 3, 16, 16)
    refold.export(net, tmp_path / "net.onnx", image, fold=False)
    before = kinds(onnx.load(tmp_path / "net.onnx"))
    refold.fold(tmp_path / "net.onnx", tmp_path / "plain.onnx")
    plain = onnx.load(tmp_path / "plain.onnx")
    assert before["Conv"] == 10
    assert kinds(plain) == {"Conv": 2, "Relu": 2}
    assert {p.key for p in plain.metadata_props} >= {"producer", "form", "inputs"}
