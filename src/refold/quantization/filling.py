"""A plain form as an ONNX file whose integers are filled in: where quantisation and training with rounding begin."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from math import prod
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass, RemoveUnusedNodesPass
from onnxscript.optimizer import fold_constants
from torch import Tensor, nn

from refold.errors import InputError
from refold.export import export
from refold.onnx_files.saving import save_model
from refold.quantization.config import QuantizationConfig
from refold.quantization.lockstep import Lockstep, Result
from refold.quantization.skeleton import LAYERS, Array, Graph, compact, write_skeleton
from refold.quantization.weights_alone import pack, write_weights_alone

# Images that run through the network at once.
PART = 20
# Values of one activation in both streams, five bytes each.
_MOST_VALUES = 120_000_000


class Filled:
    """A plain network as a float file and as one with integers, in a folder that is there.

    ``plain`` is the float graph, ``graph`` the other once it is filled in; ``images`` give the ranges.
    Raises `InputError` where a layer to leave in float is none.
    """

    graph: Graph
    result: Result

    def __init__(
        self,
        network: nn.Module,
        folder: Path,
        images: Tensor,
        config: QuantizationConfig,
        class_names: Sequence[str] | None,
    ) -> None:
        self.config = config
        self.source, self.int8 = folder / "float.onnx", folder / "int8.onnx"
        self.notes: list[str] = []
        export(network, self.source, images[:1], class_names=class_names)
        _settle_constants(self.source)
        self.plain = Graph(onnx.load(str(self.source)))
        self.in_float = self._named(config.in_float)
        self.images = in_parts(self._that_fit(images))

    def fill(self) -> None:
        """Choose ranges, integers and biases, and write the file."""
        config = self.config
        settings: Any = {"per_channel": config.weights == "channel", "in_float": self.in_float}
        if config.activations == "int8":
            example = dict.fromkeys(self.plain.inputs, self.images[0][:1])
            self.graph = write_skeleton(self.source, self.int8, example, **settings)
        else:
            self.graph = write_weights_alone(self.source, **settings)
        self.result = Lockstep(self.graph, self.plain, self.images, config).run()
        if config.activations == "float32":
            pack(self.graph, config.bits)
        compact(self.graph)
        onnx.save(self.graph.model, str(self.int8))

    def _that_fit(self, images: Tensor) -> Tensor:
        """As many of the images, evenly spread, as both streams can hold of the largest value in the network."""
        graph = onnx.shape_inference.infer_shapes(self.plain.model).graph
        sizes = [prod(axis.dim_value or 1 for axis in v.type.tensor_type.shape.dim) for v in graph.value_info]
        most = max(1, _MOST_VALUES // max([1, *sizes]))
        if len(images) <= most:
            return images
        self.notes = [
            f"The ranges were taken from {most} of {len(images)} images: more would take too much memory."
        ]
        return images[[int(index * len(images) / most) for index in range(most)]]

    def _named(self, wanted: Sequence[str]) -> list[str]:
        """The names of the weights of the layers that were named, by these or by the layers' paths."""
        known = {name for node in self.plain.nodes if node.op_type in LAYERS for name in node.input[1:2]}
        found = [name if name in known else f"{name}.weight" for name in wanted]
        for name, given in zip(found, wanted, strict=True):
            if name not in known:
                near = ", ".join(get_close_matches(given, sorted(known), 3)) or ", ".join(sorted(known)[:3])
                raise InputError(f"There is no layer '{given}' to leave in float; there are: {near}.")
        return found


def in_parts(images: Tensor) -> list[Array]:
    """The images as arrays of as many as run at once."""
    return [part.numpy() for part in images.split(PART)]


def _settle_constants(path: Path) -> None:
    """Store in an ONNX file what its operators compute from constants alone, as PyTorch before 2.7 does not.

    A bound of a Clip that an operator makes keeps the quantiser from taking the Clip into the rounding, and such an
    operator has no value for each image, which a pass over both streams is made of.
    """
    model = ir.load(path)
    fold_constants(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    RemoveUnusedNodesPass()(model)
    save_model(model, path)
