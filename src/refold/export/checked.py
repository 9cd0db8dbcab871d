"""Export, then run the written file in its engine against PyTorch before it takes its place."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from refold.boxes import Detections
from refold.errors import InputError, NotEquivalent
from refold.export.comparing import Case, compare, compare_boxes, make_cases, outputs_of, spread_of
from refold.export.engines import FORMATS, CannotRun, Format, get_engine
from refold.export.metadata import OutputKind, are_probabilities, describe, ports_of
from refold.export.placing import check_destination, files_of, placed_together
from refold.export.preparing import choose_normalization, known_preprocessing, prepare
from refold.export.report import ExportReport
from refold.export.request import FLOAT16, Inputs, Normalization, Precision, Request
from refold.export.running import run_apart, start
from refold.folding import fold
from refold.models.classes import check_class_names

# Parts of the outputs' spread.
_TOLERANCE = {torch.float16: 5e-2, torch.bfloat16: 1e-1, torch.float32: 1e-3, torch.float64: 1e-9}


def export_checked(
    model: nn.Module,
    request: Request,
    *,
    engine: str,
    normalize: bool | Normalization = False,
    softmax: bool = False,
    class_names: Sequence[str] | None = None,
    folding: bool = True,
    tolerance: float | None = None,
) -> ExportReport:
    """Do what `refold.export` promises; the metadata are put together here."""
    backend = get_engine(engine)
    start()
    kind = FORMATS[engine]
    check_destination(request.path, kind)
    _check_free_shapes(request, kind)
    preprocessing = known_preprocessing(model)
    normalization = choose_normalization(normalize, preprocessing)
    # In another layout than this one, converters write transpositions into the file, or files that are wrong.
    inputs = tuple(tensor.detach().cpu().contiguous() for tensor in request.inputs)
    form = "plain" if folding or hasattr(model, "fold_report") else "training"
    if folding and not hasattr(model, "fold_report"):
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        there = tuple(tensor.to(device) for tensor in inputs)
        model = model.of(fold(model.detector, there)) if isinstance(model, Detections) else fold(model, there)
    # The user's module keeps its mode and device.
    network = copy.deepcopy(model).cpu().eval()
    ready = prepare(network, inputs, normalization, softmax=softmax)
    cases = make_cases(ready, replace(request, inputs=inputs))
    metadata = describe(
        model,
        preprocessing,
        _checked_names(model, class_names, cases[0]),
        normalization,
        output=_kind_of_output(network, inputs, cases, softmax=softmax),
        form=form,
        ports=ports_of(replace(request, inputs=inputs), cases[0].expected),
    )
    allowed = _default_tolerance(cases, request.precision) if tolerance is None else tolerance
    with placed_together(request.path, kind) as aside:
        notes = list(backend.write(ready, replace(request, inputs=inputs, path=aside, metadata=metadata)))
        contents = backend.contents(aside)
        try:
            results = run_apart(engine, aside, [case.arguments for case in cases])
            boxes = bool(request.outputs)
            trials = compare_boxes(results, cases, request.precision) if boxes else compare(results, cases)
        except CannotRun as error:
            trials, notes = [], [*notes, str(error)]
        if request.outputs and not any(len(case.expected[0]) for case in cases):
            notes.append(
                "No image had a box above the threshold: that there is none is all that was compared."
            )
        report = ExportReport(
            path=str(request.path),
            engine=engine,
            form=form,
            precision=request.precision,
            bytes=sum(file.stat().st_size for file in files_of(aside)),
            contents=contents,
            trials=trials,
            spread=spread_of(cases),
            tolerance=allowed,
            notes=notes,
        )
        if report.checked and not report.relative_difference <= allowed:  # NaN is a difference too
            raise NotEquivalent(
                f"The export to '{request.path}' was discarded: {kind.title} differs from PyTorch by "
                f"{report.relative_difference:.3g} of the outputs' spread, {allowed:.3g} is allowed.",
                report,
            )
    return report


def _check_free_shapes(request: Request, kind: Format) -> None:
    wanted = (
        "Images of any size" if request.dynamic_size else "Boxes, of which each image has another number,"
    )
    if (request.dynamic_size or request.outputs) and not kind.free_shapes:
        able = [form.title for form in FORMATS.values() if form.free_shapes]
        raise InputError(
            f"{wanted} cannot be written for {kind.title}; export for {' or '.join(able)}, or the maps at one size."
        )


def _checked_names(model: nn.Module, class_names: Sequence[str] | None, case: Case) -> Sequence[str] | None:
    """The class names given, or those of the checkpoint; raises `InputError` where there is not one a class."""
    if isinstance(class_names, str) or any(not isinstance(name, str) for name in class_names or ()):
        raise InputError(
            f"The class names are {class_names!r:.80}; give a list of texts, one for each class."
        )
    names = getattr(getattr(model, "card", None), "class_names", None) if class_names is None else class_names
    if names is not None and len(case.expected) == 1 and case.expected[0].dim() > 1:
        source = type(model).__name__ if class_names is None else "The export"
        check_class_names(names, case.expected[0].shape[1], source)
    return names


def _kind_of_output(network: nn.Module, inputs: Inputs, cases: list[Case], *, softmax: bool) -> OutputKind:
    """What the file gives; raises `InputError` where a softmax would follow upon another or upon no logits."""
    known: OutputKind | None = getattr(network, "output_kind", None)
    if known is not None:
        if softmax and known != "segmentation":
            raise InputError(
                f"{type(network).__name__} gives {known}, not logits of classes; leave softmax out."
            )
        return known
    outputs = (
        outputs_of(network, inputs) if softmax else [case.expected[0] for case in cases if case.expected]
    )
    if not outputs or not all(are_probabilities(rows) for rows in outputs):
        return "probabilities" if softmax else "logits"
    if softmax:
        raise InputError(
            f"{type(network).__name__} gives probabilities by itself; leave softmax out, for a second one would "
            "make all classes nearly equal."
        )
    return "probabilities"


def _default_tolerance(cases: list[Case], precision: Precision) -> float:
    dtypes = {tensor.dtype for case in cases for tensor in case.expected}
    if precision == FLOAT16:
        dtypes.add(torch.float16)
    return max((_TOLERANCE.get(dtype, 1e-3) for dtype in dtypes), default=1e-3)
