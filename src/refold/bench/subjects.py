"""Models in their forms, and the files that engines load."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from refold.bench.turns import TimingFailed
from refold.bench.ways import INT8, Stored
from refold.bench.worker import PYTORCH
from refold.checkpoints import example_input
from refold.errors import InputError, RefoldError, first_line
from refold.export import FORMATS, Request
from refold.export.checked import export_checked
from refold.export.preparing import in_precision
from refold.export.request import FLOAT32
from refold.folding import Cost, count, fold
from refold.models import create_model
from refold.quantization import QuantizationConfig, quantize

TRAINING, PLAIN, SHORTCUT_FOLDED = "training", "plain", "shortcut-folded"
FORMS = (TRAINING, PLAIN, SHORTCUT_FOLDED)
DEFAULT_FORMS = (TRAINING, PLAIN)
# One form, for times alone.
_INT8 = QuantizationConfig(keep_identity="never", round_together=False)
# Of all models, or of each by its name.
Forms = Sequence[str] | Mapping[str, Sequence[str]] | None


@dataclass
class Subject:
    """One model under the name to show, and the forms it is measured in; `source` is a model's name or a module."""

    name: str
    source: str | nn.Module
    forms: tuple[str, ...]
    _models: dict[str, nn.Module] = field(default_factory=dict)

    def input_size(self, wanted: Sequence[int] | None) -> tuple[int, ...]:
        """(channels, height, width) of its images: what is wanted, else the model's own."""
        return tuple(example_input(self._given(), wanted).shape[1:])

    def _given(self) -> nn.Module:
        if "" not in self._models:
            built = create_model(self.source) if isinstance(self.source, str) else copy.deepcopy(self.source)
            self._models[""] = built.cpu().eval()
        return self._models[""]

    def model(self, form: str, input_size: Sequence[int] | None) -> nn.Module:
        """The eval-mode model on the CPU in a form; raises `TimingFailed` where there is no such form."""
        try:
            if form not in self._models:
                self._models[form] = self._make(form, input_size)
        except (RefoldError, RuntimeError, MemoryError) as error:
            raise TimingFailed(f"the form '{form}' cannot be made: {first_line(error)}") from error
        return self._models[form]

    def _make(self, form: str, input_size: Sequence[int] | None) -> nn.Module:
        given = self._given()
        if form == TRAINING or (form == PLAIN and hasattr(given, "fold_report")):
            return given
        example = example_input(given, input_size)
        if form == SHORTCUT_FOLDED:
            # One kernel in each unit, as the paper has it, though that takes more multiplications in RepUnit1.
            return fold(given, example, shortcuts="fold", objective="operators")
        return fold(given, example)

    def example(self, form: str, batch_size: int, input_size: Sequence[int] | None) -> Tensor:
        """Random images `(batch, channels, height, width)` for a form of the model."""
        image = example_input(self.model(form, input_size), input_size)
        return torch.randn(batch_size, *image.shape[1:], generator=torch.Generator().manual_seed(0)).to(
            image.dtype
        )

    def cost(self, form: str, input_size: Sequence[int] | None) -> Cost:
        """What one image costs."""
        return count(self.model(form, input_size), self.example(form, 1, input_size))


def subjects_of(
    models: str | nn.Module | Iterable[str | nn.Module] | Mapping[str, str | nn.Module],
    forms: Forms,
) -> list[Subject]:
    """The models of a benchmark by name.

    A model's name is built in `forms`, by default training and plain; a module is taken in these forms or, by
    default, as it is. `forms` may also map names to their own. A model that was folded already has no training form.
    Raises `InputError` for an unknown form, and for two models of the same name and form.
    """
    listed = [form for own in forms.values() for form in own] if isinstance(forms, Mapping) else forms or ()
    unknown = next((form for form in listed if form not in FORMS), None)
    if unknown is not None:
        raise InputError(f"There is no form '{unknown}'; choose among: {', '.join(FORMS)}.")
    if isinstance(models, str | nn.Module):
        models = [models]
    named = (
        list(models.items()) if isinstance(models, Mapping) else [(_title(model), model) for model in models]
    )
    if not named:
        raise InputError("There is no model to measure; give at least one.")
    subjects = []
    for name, model in named:
        own: Sequence[str] = DEFAULT_FORMS
        if not isinstance(model, str):
            own = (PLAIN,) if hasattr(model, "fold_report") else (TRAINING,)
        asked = (forms.get(name) if isinstance(forms, Mapping) else forms) or own
        wanted = [form for form in asked if not (own == (PLAIN,) and form == TRAINING)]
        subjects.append(Subject(name, model, tuple(dict.fromkeys(wanted or own))))
    measured = [(subject.name, form) for subject in subjects for form in subject.forms]
    twice = next((pair for pair in measured if measured.count(pair) > 1), None)
    if twice is not None:
        raise InputError(
            f"Two models are named {twice[0]} in the form {twice[1]}; tell them apart: "
            "refold.benchmark({'first': ..., 'second': ...})."
        )
    return subjects


class Files:
    """The files that engines load, each written once, in a folder that goes when the block ends."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="refold-bench-")
        self._made: dict[tuple[str, ...], Path | TimingFailed] = {}

    def __enter__(self) -> Files:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folder.cleanup()

    def path(
        self, subject: Subject, form: str, engine: str, images: Tensor, precision: Stored = FLOAT32
    ) -> Path:
        """The file of a model for an engine; raises `TimingFailed` where it cannot be made, every time."""
        # PyTorch takes any batch; the engines get the one they are measured with, as they would be deployed.
        sizes = () if engine == PYTORCH else tuple(map(str, images.shape))
        key = (subject.name, form, engine, precision, *sizes)
        if key not in self._made:
            folder = Path(self._folder.name) / str(len(self._made))
            folder.mkdir()
            try:
                model = subject.model(form, images.shape[1:])
                self._made[key] = write_for_engine(model, folder, engine, images, precision)
            except TimingFailed as error:
                self._made[key] = error
        made = self._made[key]
        if isinstance(made, TimingFailed):
            raise made
        return made


def write_for_engine(
    model: nn.Module, folder: Path, engine: str, images: Tensor, precision: Stored = FLOAT32
) -> Path:
    """The file, in `folder`, of an eval-mode model for an engine; raises `TimingFailed` where it cannot be made."""
    try:
        if engine == PYTORCH:
            path = folder / "net.pt"
            if precision == INT8:
                raise InputError("int8 files are for engines")
            torch.save(in_precision(model, precision), path)
            return path
        path = folder / f"net{FORMATS[engine].suffix}"
        if precision == INT8:
            if not hasattr(model, "fold_report"):
                raise InputError("int8 files are made of the plain form")
            quantize(model, path, torch.cat([images, images.flip(-1)]), engine=engine, config=_INT8)
            return path
        export_checked(model, Request((images,), path, precision=precision), engine=engine, folding=False)
        return path
    except Exception as error:  # converters and pickle raise what they like; the rest of the run goes on
        raise TimingFailed(f"it cannot be written for {engine}: {first_line(error)}") from error


def _title(model: str | nn.Module) -> str:
    if isinstance(model, str):
        return model
    architecture: Any = getattr(model, "architecture", None) or {}
    return architecture.get("name") or type(model).__name__
