"""What a quantisation can be told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from refold.errors import InputError

CPU = Literal["avx2", "vnni", "arm", "any"]
CPUS: tuple[CPU, ...] = get_args(CPU)
Weights = Literal["channel", "tensor"]
WEIGHTS: tuple[Weights, ...] = get_args(Weights)
Activations = Literal["int8", "float32"]
ACTIVATIONS: tuple[Activations, ...] = get_args(Activations)
KeepIdentity = Literal["auto", "never", "always"]
KEEP_IDENTITY: tuple[KeepIdentity, ...] = get_args(KeepIdentity)


@dataclass(frozen=True)
class QuantizationConfig:
    """How `refold.quantize` works; the defaults are what it is for.

    ``cpu`` is the arithmetic that the scales must fit: "avx2" (and SSE) adds two products in 16 bits, "vnni" and
    "arm" in 32; "any" is safe on all. ``weights`` have one scale for each output channel, or one for the tensor, as
    some engines need. ``activations`` in float32 leave nothing but the weights to be integers: a small file, as fast as
    the float one. ``bits`` of a weight are 8 or fewer; up to 4 are two to a byte where activations are floats, and else
    in the same bytes. ``keep_identity`` says whether identity
    branches stay out of the kernels of a training form: "auto" where a measurement on the engine says that it pays.
    ``max_drop`` is how many percentage points the answers may lose before layers are left in float32; ``in_float``
    names layers that are in any case. ``rotate``, ``balance``, ``correct_bias``, ``round_together`` and ``clip_ranges``
    turn off the parts that make the file nearer to the network, for measuring what each is worth.
    Raises `InputError` where a value is none of these.

    Examples:
        >>> import refold
        >>> refold.QuantizationConfig(cpu="vnni").adds_in_pairs
        False
    """

    cpu: CPU = "any"
    weights: Weights = "channel"
    activations: Activations = "int8"
    bits: int = 8
    keep_identity: KeepIdentity = "auto"
    max_drop: float | None = None
    in_float: Sequence[str] = ()
    rotate: bool = True
    balance: bool = True
    correct_bias: bool = True
    round_together: bool = True
    clip_ranges: bool = True

    def __post_init__(self) -> None:
        for name, value, known in (
            ("cpu", self.cpu, CPUS),
            ("weights", self.weights, WEIGHTS),
            ("activations", self.activations, ACTIVATIONS),
            ("keep_identity", self.keep_identity, KEEP_IDENTITY),
            ("bits", self.bits, (2, 3, 4, 5, 6, 7, 8)),
        ):
            if value not in known:
                raise InputError(f"{name} is {value!r}; choose one of: {', '.join(map(str, known))}.")
        if self.max_drop is not None and not 0 <= self.max_drop <= 100:
            raise InputError(f"max_drop is {self.max_drop!r}; give percentage points from 0 to 100.")

    @property
    def adds_in_pairs(self) -> bool:
        """Whether a processor that is meant adds two products of integers in 16 bits."""
        return self.cpu in ("avx2", "any") and self.activations == "int8"
