"""Nearest-neighbour resizes as a choice of rows and columns, for engines that would take other pixels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

_RESIZES = {torch.ops.aten.upsample_nearest2d.vec, torch.ops.aten.upsample_nearest2d.default}


def resizes_as_choices(model: nn.Module, arguments: tuple[Tensor, ...]) -> nn.Module:
    """The model with every resize that does more than repeat pixels replaced by indexing, for these sizes.

    Where an engine rounds to another pixel than PyTorch, it does so where sizes are no multiples; a whole
    multiple repeats each pixel under any rule. The model itself is returned where there is nothing to replace.
    """
    exported: Any = torch.export.export(model, arguments).module()
    graph: fx.Graph = exported.graph
    resizes = [node for node in graph.nodes if node.target in _RESIZES]
    chosen = {node: [_chosen(node, axis) for axis in (2, 3)] for node in resizes}
    replaced = {node: both for node, both in chosen.items() if not all(map(_repeats, both))}
    if not replaced:
        return model
    for number, (node, both) in enumerate(replaced.items()):
        source = node.args[0]
        with graph.inserting_before(node):
            for axis, indices in enumerate(both, start=2):
                name = f"refold_pixels_{number}_{axis}"
                exported.register_buffer(name, indices)
                source = graph.call_function(
                    torch.ops.aten.index_select.default, (source, axis, graph.get_attr(name))
                )
        node.replace_all_uses_with(source)
        graph.erase_node(node)
    exported.recompile()
    result: nn.Module = exported
    return result


def _chosen(node: fx.Node, axis: int) -> Tensor:
    """The index along an axis of the pixel that PyTorch takes for each place of the result."""
    resize: Any = node.target
    source: Any = node.args[0]
    height, width = source.meta["val"].shape[2:]
    indices = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")[axis - 2]
    resized: Tensor = resize(indices[None, None].float(), *node.args[1:], **node.kwargs)
    return resized[0, 0].select(3 - axis, 0).long()


def _repeats(indices: Tensor) -> bool:
    """Whether every pixel is taken, equally often."""
    pixels, counts = indices.unique_consecutive(return_counts=True)
    every = torch.equal(pixels, torch.arange(len(pixels)))
    return every and bool((counts == counts[0]).all())
