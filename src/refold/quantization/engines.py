"""Which engines run int8 files of refold, and which do not, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from refold.errors import InputError, first_line
from refold.export import FORMATS, get_engine
from refold.export.request import FLOAT32
from refold.quantization.checking import Session, opened
from refold.quantization.config import QuantizationConfig

# What was found when it was tried; each is the sentence that an error says.
WITHOUT_INT8 = {
    "aotinductor": "its compiled files hold what PyTorch computes, and PyTorch's own int8 convolutions need another "
    "graph than the one that was checked",
    "executorch": "its int8 kernels (XNNPACK) are reached through a quantiser of its own, which takes no given "
    "integers",
    "coreml": "its activations cannot be given as integers, and it runs on Apple's systems alone",
    "ncnn": "what makes its int8 files (ncnn2table, ncnn2int8) is not in its Python packages, pnnx turns the rounding "
    "of an ONNX file into float arithmetic, and its activations are symmetric, which these files' are not",
    "mnn": "its converter breaks off at ONNX files with integer weights (tried with 3.6), and its own mnnquant takes "
    "images, not integers",
    "litert": "its quantiser (ai-edge-quantizer) guesses the scales of given integers from the weights, and of dense "
    "layers alone; the others it rounds itself",
    "tensorrt": "it needs an NVIDIA card and chooses symmetric ranges, which these files do not have",
}


@dataclass(frozen=True)
class Quantized:
    """How an engine takes the ONNX file with integers: ``write`` makes its file of it."""

    engine: str
    write: Callable[[Path, Path], None]
    notes: tuple[str, ...] = ()

    def open(self, path: Path, *, threads: int | None = None) -> Session:
        """A file of the engine, ready to run on arrays."""
        if self.engine == "onnxruntime":
            return opened(path, threads=threads)
        session = get_engine(self.engine).open(path, threads=threads)
        return lambda images: [output.numpy() for output in session(torch.from_numpy(images))]

    def open_float(self, source: Path, folder: Path, *, threads: int = 1) -> Session:
        """The float file for the same engine, of the ONNX file ``source``; what is written goes into ``folder``."""
        aside = folder / f"float{FORMATS[self.engine].suffix}"
        if aside != source:
            self.write(source, aside)
        return self.open(aside, threads=threads)


def engine_for(name: str, config: QuantizationConfig) -> Quantized:
    """How an engine gets its int8 file; raises `InputError`, with the reason, where it has none."""
    if name in WITHOUT_INT8:
        raise InputError(
            f"There are no int8 files for {FORMATS[name].title}: {WITHOUT_INT8[name]}; choose one of: "
            f"{', '.join(_WRITERS)}."
        )
    get_engine(name)
    return Quantized(name, _WRITERS[name])


def _copied(source: Path, target: Path) -> None:
    target.write_bytes(source.read_bytes())


def _as_openvino(source: Path, target: Path) -> None:
    import openvino

    from refold.export.openvino import save

    try:
        save(openvino.convert_model(source), target, _metadata(source), FLOAT32)
    except Exception as error:
        raise InputError(f"OpenVINO cannot convert the int8 file: {first_line(error)}.") from error


def _metadata(source: Path) -> dict[str, Any]:
    return get_engine("onnxruntime").read_metadata(source)


_WRITERS: dict[str, Callable[[Path, Path], None]] = {"onnxruntime": _copied, "openvino": _as_openvino}
