"""What an exported file says of itself: what goes in, what comes out, and what is left to do with an image."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError
from torch import Tensor, nn

from refold.errors import InputError
from refold.export.request import Normalization, Request

OutputKind = Literal["logits", "probabilities", "maps", "detections", "instances", "segmentation"]
PortKind = Literal["image", "output"]

# What two roundings to float16 may add up to, over a thousand classes.
_SUM_TOLERANCE = 1e-2
# Below it, only a softmax makes outputs add up to one: logits do not by chance.
_SUM_BY_SOFTMAX = 1e-5

_Side = Annotated[int, Field(gt=0, le=8192)]


class Preprocessing(BaseModel):
    """How images are prepared, in timm's terms; the pixels have values from 0 to 1. What is None is not known."""

    model_config = ConfigDict(frozen=True)

    input_size: tuple[Annotated[int, Field(gt=0, le=64)], _Side, _Side] | None = None
    mean: tuple[FiniteFloat, ...] | None = None
    std: tuple[Annotated[FiniteFloat, Field(gt=0)], ...] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"] | None = None
    # Above one, the image is smaller than what the network takes, and gets a border.
    crop_pct: Annotated[FiniteFloat, Field(gt=0, le=2)] | None = None
    crop_mode: Literal["center", "squash", "border"] | None = None

    def known(self) -> dict[str, Any]:
        """What is not None."""
        return self.model_dump(exclude_none=True)


class Port(BaseModel):
    """An input or an output: its name, its dtype and its shape, in which free axes have names.

    ``layout`` tells the order of an image's axes; there is one only.
    """

    name: str
    shape: list[int | Literal["batch", "height", "width", "boxes"]]
    dtype: str
    layout: Literal["NCHW"] | None = None


class Description(BaseModel):
    """What a file says; None is what it does not say."""

    producer: str | None = None
    architecture: str | None = None
    output: OutputKind | None = None
    class_names: list[str] | None = None
    preprocessing: Preprocessing | None = None
    inputs: list[Port] | None = None
    outputs: list[Port] | None = None

    @property
    def batch(self) -> int | None:
        """The number of images that a call must have; None where any will do, one where the file does not say."""
        size = self.inputs[0].shape[0] if self.inputs and self.inputs[0].shape else 1
        return size if isinstance(size, int) else None


_TEXTS = ("producer", "architecture", "output")
_FIELDS: dict[str, TypeAdapter[Any]] = {
    name: TypeAdapter(cast(Any, field.annotation)) for name, field in Description.model_fields.items()
}


def describe(
    model: nn.Module,
    preprocessing: Mapping[str, Any],
    class_names: Sequence[str] | None,
    normalization: Normalization | None,
    *,
    output: OutputKind,
    form: str,
    ports: tuple[list[Port], list[Port]],
) -> dict[str, str]:
    """The metadata of a file; all but single words as JSON.

    With the normalization baked in, ``preprocessing`` says what is left to do, which is mean 0 and deviation 1, or
    1/255 for a normalization of pixels from 0 to 255, and ``normalization`` what the file does. ``ports`` are the
    inputs and the outputs.
    """
    architecture = getattr(model, "architecture", None) or {}
    left = dict(preprocessing)
    metadata = {
        "producer": f"refold {version('refold')}",
        "architecture": str(architecture.get("name") or type(model).__name__),
        "form": form,
        "output": output,
    }
    inputs, outputs = ports
    shape = inputs[0].shape if len(inputs) == 1 else []
    if len(shape) == 4 and all(isinstance(side, int) for side in shape[1:]):
        # The example says what the file takes, whatever the network was trained at; where any size will do, the
        # network's own is the one to begin with.
        left["input_size"] = shape[1:]
    if normalization is not None:
        mean, std = normalization
        left |= {"mean": [0.0] * len(mean), "std": [1 / pixel_range(normalization)] * len(std)}
        metadata["normalization"] = json.dumps({"mean": list(mean), "std": list(std)})
    if left:
        metadata["preprocessing"] = json.dumps(left)
    if class_names is not None:
        metadata["class_names"] = json.dumps(list(class_names), ensure_ascii=False)
    metadata["inputs"] = json.dumps([port.model_dump(exclude_none=True) for port in inputs])
    metadata["outputs"] = json.dumps([port.model_dump(exclude_none=True) for port in outputs])
    return metadata


def pixel_range(normalization: Normalization) -> int:
    """The largest value of the pixels that a normalization is for: 255 or 1."""
    mean, std = normalization
    # Of pixels from 0 to 1, neither the mean nor the deviation can be above one.
    return 255 if max(*mean, *std) > 1 else 1


def port_names(kind: PortKind, count: int) -> list[str]:
    """What the inputs or the outputs of a file are called, in every format that has names."""
    if count == 1:
        return [kind]
    return [f"{'input' if kind == 'image' else kind}_{index}" for index in range(count)]


def ports_of(request: Request, outputs: Sequence[Tensor]) -> tuple[list[Port], list[Port]]:
    """The inputs and the outputs of a network, by its example and what it gave for it."""

    def port(name: str, tensor: Tensor, free: Mapping[int, str]) -> Port:
        return Port(
            name=name,
            shape=cast(Any, [free.get(axis, side) for axis, side in enumerate(tensor.shape)]),
            dtype=str(tensor.dtype).removeprefix("torch."),
            layout="NCHW" if tensor.dim() == 4 else None,
        )

    given, made = port_names("image", len(request.inputs)), port_names("output", len(outputs))
    return (
        [
            port(name, value, request.free_axes(value))
            for name, value in zip(given, request.inputs, strict=True)
        ],
        [
            port(name, value, {0: "boxes"} if request.outputs else request.free_axes(value))
            for name, value in zip(request.outputs or made, outputs, strict=True)
        ],
    )


def read_description(metadata: Mapping[str, Any], path: Path) -> Description:
    """What the metadata of the file at ``path`` say; entries that are not refold's are left aside.

    Raises `InputError`, naming the file and the entry, where one is not understood.
    """
    found = {}
    for key, field in _FIELDS.items():
        if key in metadata:
            text = metadata[key]
            try:
                found[key] = (
                    field.validate_python(text, strict=True)
                    if key in _TEXTS
                    else field.validate_json(text, strict=True)
                )
            except ValidationError as error:
                raise InputError(_not_understood(error, key, path, "export the network again")) from error
    return Description(**found)


def read_preprocessing(values: Mapping[str, Any], source: str) -> Preprocessing:
    """Preprocessing by timm's terms; raises `InputError`, naming the source, where a value is not understood."""
    known = {key: values[key] for key in Preprocessing.model_fields if values.get(key) is not None}
    try:
        return Preprocessing.model_validate(known)
    except ValidationError as error:
        raise InputError(_not_understood(error, "preprocessing", source, "correct it")) from error


def _not_understood(error: ValidationError, key: str, source: object, advice: str) -> str:
    first = error.errors(include_url=False)[0]
    place = ".".join([key, *map(str, first["loc"])])
    shown = repr(first["input"])
    return (
        f"What '{source}' says as {place} is not understood: {shown if len(shown) < 60 else shown[:57] + '...'} "
        f"({first['msg'][0].lower()}{first['msg'][1:]}); {advice}."
    )


def are_probabilities(rows: Tensor, *, tolerance: float = _SUM_BY_SOFTMAX) -> bool:
    """Whether each row (n, classes) is a distribution: nowhere negative, and with the sum one."""
    if rows.dim() != 2 or rows.shape[1] < 2 or not rows.is_floating_point() or not len(rows):
        return False
    rows = rows.double()
    return bool((rows >= 0).all()) and bool(((rows.sum(dim=1) - 1).abs() <= tolerance).all())


def check_probabilities(rows: Tensor, source: str) -> None:
    """Raise `InputError` where rows (n, classes) are not the probabilities that the source says they are."""
    if rows.shape[1] > 1 and not are_probabilities(rows, tolerance=_SUM_TOLERANCE):
        raise InputError(
            f"{source} says that it gives probabilities, but the outputs for an image go from {rows.min():.3g} to "
            f"{rows.max():.3g} and add up to {rows[0].sum():.3g}; export the network again."
        )
