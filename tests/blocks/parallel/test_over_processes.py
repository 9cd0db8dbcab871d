"""Branches with synchronised batch norms see the batches of all processes."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from refold.blocks.parallel import ParallelBranches
from refold.blocks.parallel.branch import Branch
from refold.blocks.parallel.synchronised import synchronise_norms

SYNCHRONISE: dict[str, Callable[[nn.Module], nn.Module]] = {
    "accelerators": nn.SyncBatchNorm.convert_sync_batchnorm,
    "cpu": lambda layer: synchronise_norms(layer, torch.device("cpu")),
}


def _layers() -> list[ParallelBranches]:
    torch.manual_seed(0)
    made = []
    for size, groups in ((1, 1), (3, 6)):
        branches = [
            Branch(nn.Conv2d(6, 6, k, padding=k // 2, groups=groups, bias=False), nn.BatchNorm2d(6))
            for k in (size, size, 1)
        ]
        made.append(ParallelBranches(branches, nn.BatchNorm2d(6), form="moments").double())
    return made


def _inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    # Batches of unlike sizes, so that a mean of means would be wrong.
    return [torch.randn(batch, 6, 5, 4, generator=generator, dtype=torch.float64) for batch in (3, 1)]


def _results(layer: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    out = layer(x)
    (out * torch.linspace(-1, 2, 20, dtype=torch.float64).reshape(5, 4)).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"output": out.detach(), "input": x.grad, **gradients, **dict(layer.named_buffers())}


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for kind, synchronise in SYNCHRONISE.items():
        for number, layer in enumerate(_layers()):
            torch.save(_results(synchronise(layer), _inputs()[rank]), f"{folder}/{kind}-{number}-{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_are_one_batch(tmp_path: Path) -> None:
    # Not forked: a process in which a backward pass ran before cannot run one in a fork.
    mp.spawn(_work, (str(tmp_path),), nprocs=2)
    for number, layer in enumerate(_layers()):
        layer.form = "looped"
        whole = _results(layer, torch.cat(_inputs()))
        for kind in SYNCHRONISE:
            parts = [torch.load(tmp_path / f"{kind}-{number}-{rank}.pt") for rank in range(2)]
            for name, expected in whole.items():
                if name in ("output", "input"):
                    found = torch.cat([part[name] for part in parts])
                elif name in dict(layer.named_parameters()):
                    found = parts[0][name] + parts[1][name]
                else:
                    found = parts[0][name]
                    assert torch.equal(found, parts[1][name])
                error = float((found - expected).abs().max())
                assert error <= 1e-9 * max(float(expected.abs().max()), 1.0), (kind, name)
