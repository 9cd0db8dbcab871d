"""What `unfold` did, as data: enough to do it again to another model of the class, and to find the way back."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from refold.blocks.parallel import BranchComputation
from refold.unfolding.plans import Kind, Shape


@dataclass(frozen=True)
class UnfoldedLayer:
    """One layer that got branches.

    `norm` is the path of the batch norm that its first branch took over. `branches` counts all of them but the `skip`,
    a batch norm of the input. They are `repeats` kernels of the layer's own size, and those of `shapes` that fit.
    """

    path: str
    norm: str | None
    kind: Kind
    stage: int
    branches: int
    skip: bool
    shapes: tuple[Shape, ...]
    repeats: int


@dataclass(frozen=True)
class UnfoldReport:
    """What `unfold` did, and what the way back needs to know of the original model."""

    plan: str
    layers: list[UnfoldedLayer]
    norms: dict[str, str] = field(repr=False)
    """The batch norm behind each convolution of the original."""
    form: BranchComputation = "auto"
    before: dict[str, Any] | None = field(default=None, repr=False)
    """How a model that was folded before it was unfolded came to be: the options of that `fold`, and as `unfold` the
    record of what was unfolded before that, if anything was."""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict, repr=False)
    """Of every tensor of the original's state dict."""
    epsilons: dict[str, float] = field(default_factory=dict, repr=False)
    """Of every batch norm behind a convolution."""

    def __str__(self) -> str:
        kinds = Counter(layer.kind for layer in self.layers)
        counted = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
        return f"{self.plan}: {len(self.layers)} layers unfolded ({counted})"

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON-able values, without what the original model itself tells."""
        return {
            "plan": self.plan,
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "norms": dict(self.norms),
            "form": self.form,
            "before": self.before,
        }

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> UnfoldReport:
        """The report that `to_dict` wrote. Raises TypeError or KeyError where it did not."""
        layers = [UnfoldedLayer(**{**layer, "shapes": tuple(layer["shapes"])}) for layer in record["layers"]]
        return UnfoldReport(**{**record, "layers": layers})
