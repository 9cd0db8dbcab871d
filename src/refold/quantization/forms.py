"""The plain forms of a network that compute the same and are rounded differently: free choices, branches kept out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from refold.folding.fold import apply_passes
from refold.folding.identities import identities_out
from refold.folding.streams import rotated_streams
from refold.quantization.config import QuantizationConfig


@dataclass(frozen=True)
class PlainForm:
    """A plain network, proved to compute what the folded one does, and what was done to it."""

    network: nn.Module
    gauges: list[str] = field(default_factory=list)
    kept_out: list[str] = field(default_factory=list)


def forms_of(plain: nn.Module, example: Tensor, config: QuantizationConfig) -> list[PlainForm]:
    """The forms to try: with identities in their kernels, beside them, or both, as `config` has it."""
    folded = PlainForm(plain)
    if config.keep_identity != "never":
        split, regions = _with(plain, example, identities_out, may_cost=True)
        beside = PlainForm(split, kept_out=regions)
        forms = (
            [folded] if not regions else [beside] if config.keep_identity == "always" else [folded, beside]
        )
    else:
        forms = [folded]
    return [_rotated(form, example) for form in forms] if config.rotate else forms


def _rotated(form: PlainForm, example: Tensor) -> PlainForm:
    network, regions = _with(form.network, example, rotated_streams)
    return PlainForm(network, regions, form.kept_out)


def _with(plain: nn.Module, example: Tensor, find: Any, **settings: bool) -> tuple[nn.Module, list[str]]:
    """The network with what a pass finds in effect, and where; the same network where it finds nothing."""
    network = apply_passes(plain, example, [find], **settings)
    report: Any = network.fold_report
    if not report.regions:
        return plain, []
    return network, [f"{region.path}: {region.layer}" for region in report.regions]
