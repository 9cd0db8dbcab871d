"""The plain forms of a network that compute the same and are rounded differently: free choices, branches kept out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from refold.folding.balancing import balanced_channels
from refold.folding.dead_channels import live_channels
from refold.folding.fold import apply_passes
from refold.folding.identities import identities_out
from refold.folding.streams import rotated_streams
from refold.quantization.config import QuantizationConfig

# A pass changes every other layer of a chain at most; applied again it takes the others, and what became better.
_ROUNDS = 6


@dataclass(frozen=True)
class PlainForm:
    """A plain network, proved to compute what the folded one does, and what was done to it."""

    network: nn.Module
    gauges: list[str] = field(default_factory=list)
    kept_out: list[str] = field(default_factory=list)


def forms_of(plain: nn.Module, example: Tensor, config: QuantizationConfig) -> list[PlainForm]:
    """The forms to try: with identities in their kernels, beside them, or both, as `config` has it."""
    folded = _again(PlainForm(plain), example, live_channels)
    if config.keep_identity != "never":
        split, regions = _with(folded.network, example, identities_out, may_cost=True)
        beside = PlainForm(split, folded.gauges, regions)
        forms = (
            [folded] if not regions else [beside] if config.keep_identity == "always" else [folded, beside]
        )
    else:
        forms = [folded]
    if (
        config.balance and config.weights == "tensor"
    ):  # each channel's own scale does as much where there is one
        forms = [_again(form, example, balanced_channels) for form in forms]
    return [_again(form, example, rotated_streams, rounds=1) for form in forms] if config.rotate else forms


def _again(form: PlainForm, example: Tensor, find: Any, rounds: int = _ROUNDS) -> PlainForm:
    """The form with what a pass finds in effect, until it finds no more."""
    for _ in range(rounds):
        network, regions = _with(form.network, example, find)
        if not regions:
            break
        form = PlainForm(network, [*form.gauges, *regions], form.kept_out)
    return form


def _with(plain: nn.Module, example: Tensor, find: Any, **settings: bool) -> tuple[nn.Module, list[str]]:
    """The network with what a pass finds in effect, and where; the same network where it finds nothing."""
    network = apply_passes(plain, example, [find], **settings)
    report: Any = network.fold_report
    if not report.regions:
        return plain, []
    return network, [f"{region.path}: {region.layer}" for region in report.regions]
