"""Fold ONNX files: the graph is folded as any network is, and what changed is carried out in the file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from torch import Tensor

from refold.errors import InputError, NotEquivalent, first_line
from refold.files import PathLike, written_together
from refold.folding.comparing import TOLERANCE
from refold.folding.fold import Named, Objective, Shortcuts, fold, verify
from refold.folding.proof import Proof, is_close, require_close, truth_of
from refold.folding.report import FoldReport
from refold.onnx_files.examples import example_of
from refold.onnx_files.network import OnnxNetwork
from refold.onnx_files.reading import read_network
from refold.onnx_files.runtime import in_runtime
from refold.onnx_files.saving import check_onnx, save_model
from refold.onnx_files.writing import written
from refold.recording.arguments import plain_mode

_READ_ALIKE = 0.05
"""How far an engine may be from the float64 result by rounding, float16 included."""


def fold_onnx(
    model: PathLike | onnx.ModelProto | ir.Model | OnnxNetwork,
    output: PathLike | None = None,
    example_input: Any = None,
    *,
    prove: bool = True,
    objective: Named | Objective = "macs",
    shortcuts: Shortcuts = "keep",
    tolerance: float = TOLERANCE,
) -> Any:
    """Fold a file into the file `output`, and return the report; or a model in memory, and return (model, report).

    `example_input` is a tensor for each input of the file, one alone or a tuple; random ones are taken where it is left
    out. The options are those of `refold.folding.fold`. The file is proved as networks are, read again and compared
    with what was proved, and run in ONNX Runtime beside the original.

    Raises `InputError` where the file cannot be read, run or written, `NotEquivalent` where a proof fails; nothing is
    written then.
    """
    if output is None and not isinstance(model, (onnx.ModelProto, ir.Model)):
        raise InputError(
            "There is no place for the folded file; give its path: fold('net.onnx', 'plain.onnx')."
        )
    if output is not None:
        check_onnx(output)
    network = model if isinstance(model, OnnxNetwork) else read_network(model)
    example = _as_tuple(example_of(network) if example_input is None else example_input)
    plain: Any = fold(
        network, example, prove=prove, objective=objective, shortcuts=shortcuts, tolerance=tolerance
    )
    report: FoldReport = replace(plain.fold_report, model=network.program.name)
    report.notes[:0] = network.program.notes
    result = written(plain, network.program, (example, {}))

    def check(folded: Path | ir.Model) -> None:
        verify(read_network(folded), plain, example, tolerance=tolerance)
        runnable = folded if isinstance(folded, Path) else ir.to_proto(folded).SerializeToString()
        _run_both(network, report, example, runnable)

    if output is None:
        if prove:
            check(result)
        return (result if isinstance(model, ir.Model) else ir.to_proto(result)), report
    with written_together(output) as aside:
        save_model(result, aside, beside=network.program.has_tensors_beside)
        if prove:
            check(aside)
    return report


def _as_tuple(example: Any) -> tuple[Tensor, ...]:
    values = example if isinstance(example, (tuple, list)) else (example,)
    if not all(isinstance(value, Tensor) for value in values):
        raise InputError(
            "The example input of a file is a tensor for each of its inputs; give one, or a tuple of them."
        )
    return tuple(values)


def _run_both(
    network: OnnxNetwork, report: FoldReport, example: tuple[Tensor, ...], folded: Path | bytes
) -> None:
    """Run the file and the folded one in ONNX Runtime, and hold both to the float64 result as every fold is.

    Raises NotEquivalent where the folded one does not run, or is further away than rounding explains.
    """
    program = network.program
    try:
        before = in_runtime(program.path or program.model.SerializeToString(), program.inputs, example)
    except Exception as error:  # operators of others, types without a kernel
        report.notes.append(f"not run in ONNX Runtime, which does not run the original ({first_line(error)})")
        return
    try:
        after = in_runtime(folded, program.inputs, example)
    except Exception as error:
        raise NotEquivalent(
            f"ONNX Runtime runs {program.name} and does not run it folded ({first_line(error)}); nothing was written."
        ) from error
    with plain_mode():
        truth = truth_of(network, [(example, {})])
        proof = truth.with_own(Proof(0.0, ()), before, after)
        if not is_close(proof):
            proof = truth.unsettled(proof)
    if not truth.answers[0].decided and not (proof.original_distance or 0.0) <= _READ_ALIKE:
        raise NotEquivalent(
            f"ONNX Runtime is {proof.original_distance:.1e} from what {program.name} was read as, so that nothing can "
            "be said about the folded file; fold the model that it was made from.",
            proof,
        )
    require_close(proof)
    if proof.original_distance is not None and proof.folded_distance is not None:
        report.notes.append(
            f"in ONNX Runtime {proof.folded_distance:.1e} from the float64 result (before folding "
            f"{proof.original_distance:.1e})"
        )
