"""Time a training step of parallel branches in each form, layer by layer or for whole networks.

    python benchmarks/training_step.py layers
    python benchmarks/training_step.py networks ghostnetv3_100 mobileone_s1 mobilenetv2_100

The forms take turns, so that a noisy machine disturbs all alike; every figure is the median of the ratios to the loop
over the branches in the same turn. Saved bytes are those that autograd keeps between forward and backward pass, each
storage counted once, parameters left out.
"""

import argparse
import copy
import statistics
import time

import torch
from torch import Tensor, nn

import refold
from refold.blocks.parallel import BranchComputation, ParallelBranches
from refold.blocks.parallel.branch import Branch

FORMS: tuple[BranchComputation, ...] = ("looped", "stacked", "moments")

# in_channels, out_channels, side of the map, kernel sizes, stride, groups, skip: layers of GhostNetV3 and MobileNetV2.
POINTWISE = [
    (16, 8, 112), (24, 36, 56), (48, 12, 56), (72, 12, 56), (72, 20, 28), (20, 60, 28), (40, 120, 28), (120, 40, 28),
    (80, 240, 14), (240, 40, 14), (480, 56, 14), (112, 336, 14), (160, 480, 7), (960, 80, 7), (32, 96, 56),
    (96, 24, 56), (144, 24, 56), (24, 144, 56), (192, 32, 28), (384, 64, 14), (64, 384, 14), (128, 128, 28),
]  # fmt: skip
DEPTHWISE = [(8, 112), (16, 112), (24, 56), (36, 56), (12, 56), (72, 56), (60, 28), (120, 28), (20, 28), (240, 14),
             (100, 14), (40, 14), (480, 7), (80, 7), (144, 56), (192, 28), (384, 14), (960, 7)]  # fmt: skip
STRIDED = [(48, 112), (96, 112), (72, 56), (144, 56), (240, 28), (192, 28), (672, 14), (576, 14)]
DENSE = [(48, 48, 56, 1), (96, 96, 28, 1), (192, 192, 14, 1), (48, 96, 56, 2)]


def branches(
    in_channels: int, out_channels: int, sizes: list[int], stride: int, groups: int
) -> ParallelBranches:
    """A sum of branches with a skip where it fits."""
    made = [
        Branch(
            nn.Conv2d(in_channels, out_channels, k, stride=stride, padding=k // 2, groups=groups, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        for k in sizes
    ]
    fits = in_channels == out_channels and stride == 1
    return ParallelBranches(made, nn.BatchNorm2d(in_channels) if fits else None)


def layers() -> dict[str, tuple[ParallelBranches, tuple[int, ...]]]:
    """The layers that are timed, each with the shape of its input without the batch."""
    found = {}
    for i, o, side in POINTWISE:
        found[f"1x1 {i}->{o} @{side}"] = (branches(i, o, [1] * 3, 1, 1), (i, side, side))
    for c, side in DEPTHWISE:
        found[f"depthwise 3x3 {c} @{side}"] = (branches(c, c, [3] * 3 + [1], 1, c), (c, side, side))
    for c, side in STRIDED:
        found[f"depthwise 3x3 stride 2 {c} @{side}"] = (branches(c, c, [3] * 3 + [1], 2, c), (c, side, side))
    for i, o, side, stride in DENSE:
        found[f"3x3+1x1 {i}->{o} stride {stride} @{side}"] = (
            branches(i, o, [3, 1], stride, 1),
            (i, side, side),
        )
    return found


def step(model: nn.Module, x: Tensor) -> None:
    """Forward and backward pass."""
    model.zero_grad(set_to_none=True)
    out = model(x)
    out.backward(out.detach())


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """What autograd keeps of one forward pass."""
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = model(x)
    del out
    return sum(kept.values())


def compare(models: dict[str, nn.Module], x: Tensor, turns: int) -> dict[str, tuple[float, float, float]]:
    """For each model: median seconds, time and bytes as ratios to the first."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(turns + 1):
        for name, model in models.items():
            start = time.perf_counter()
            step(model, x)
            if turn:
                times[name].append(time.perf_counter() - start)
    first = next(iter(models))
    held = {name: saved_bytes(model, x) for name, model in models.items()}
    return {
        name: (
            statistics.median(own),
            statistics.median(a / b for a, b in zip(own, times[first], strict=True)),
            held[name] / held[first],
        )
        for name, own in times.items()
    }


def with_form(model: nn.Module, form: BranchComputation) -> nn.Module:
    """A copy whose parallel branches run in one form."""
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, ParallelBranches):
            module.form = form
    return model


def single(model: nn.Module) -> nn.Module:
    """A copy that has only the first of all parallel branches: the network without extra branches."""
    model = copy.deepcopy(model).train()
    for path, module in list(model.named_modules()):
        if isinstance(module, ParallelBranches):
            model.set_submodule(path, module.branches[0])
    return model


def chosen(layer: ParallelBranches, x: Tensor) -> str:
    """The form that the rule takes, of a dense layer that of its 1x1 branches."""
    whole = bool(layer._spatial) and layer._fits_neighbourhood()
    return layer._pick(x, "neighbourhood" if whole else "pointwise")


def run_layers(batch: int, turns: int, contiguous: bool, only: str) -> None:
    """Print one row a layer: seconds and bytes of each form as ratios to the loop; one branch is the floor."""
    print(
        "| layer | looped, ms | stacked | moments | chosen | one branch | bytes: moments | bytes: one branch |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, (layer, shape) in layers().items():
        if only not in name:
            continue
        x = torch.randn(batch, *shape)
        x = (x if contiguous else x.to(memory_format=torch.channels_last)).requires_grad_()
        models: dict[str, nn.Module] = {form: with_form(layer, form) for form in FORMS}
        models["single"] = copy.deepcopy(layer.branches[0])
        result = compare(models, x, turns)
        looped, moments, one = (result[key] for key in ("looped", "moments", "single"))
        print(
            f"| {name} | {looped[0] * 1e3:.1f} | {result['stacked'][1]:.2f} | {moments[1]:.2f} "
            f"| {chosen(layer, x)} | {one[1]:.2f} | {moments[2]:.2f} | {one[2]:.2f} |",
            flush=True,
        )


def run_networks(names: list[str], batch: int, side: int, turns: int, contiguous: bool) -> None:
    """Print one row a network: time and bytes of the automatic choice against the loop and a single branch."""
    print(
        "| network | threads | loop, s | of the loop | of one branch each | saved bytes | bytes of one branch each |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in names:
        model, _, plan = name.partition("+")
        net = refold.create_model(model)
        layout = torch.contiguous_format if contiguous else torch.channels_last
        x = torch.randn(batch, 3, side, side).to(memory_format=layout)
        wide = refold.unfold(net, plan, example_input=x[:1]) if plan else net
        models = {
            "looped": with_form(wide, "looped"),
            "auto": with_form(wide, "auto"),
            "single": single(wide),
        }
        models = {key: m.to(memory_format=layout) for key, m in models.items()}
        result = compare(models, x, turns)
        seconds, auto, one = result["looped"][0], result["auto"], result["single"]
        print(
            f"| `{model}`{f' with {plan!r}' if plan else ''} | {torch.get_num_threads()} | {seconds:.2f} "
            f"| {auto[1]:.2f} | {auto[1] / one[1]:.2f} | {auto[2]:.2f} | {one[2]:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("layers", "networks"))
    parser.add_argument("names", nargs="*", default=["ghostnetv3_100"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--contiguous", action="store_true", help="channels first instead of channels last")
    parser.add_argument("--only", default="", help="layers: those whose name contains this")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.what == "layers":
        run_layers(arguments.batch, arguments.turns, arguments.contiguous, arguments.only)
    else:
        run_networks(arguments.names, arguments.batch, arguments.side, arguments.turns, arguments.contiguous)


if __name__ == "__main__":
    main()
