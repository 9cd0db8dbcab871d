"""What folding ONNX files gives: nodes, convolutions and batch norms, and latency in ONNX Runtime, beside folding the
network and exporting it, and beside onnxsim, onnxoptimizer and ONNX Runtime's own optimised file.

    python benchmarks/onnx_files.py exports repvgg_a0 mobileone_s0 --variants torchscript-17 dynamo-21
    python benchmarks/onnx_files.py files some.onnx others/*.onnx
    python benchmarks/onnx_files.py compare some.onnx

onnxsim and onnxoptimizer are needed for `compare` alone. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import onnx
import onnxruntime
import timm
import torch
from torch import nn

import refold
from refold.onnx_files.examples import example_of
from refold.onnx_files.reading import read_network

LOADED, ROUNDS, CALLS = 3, 10, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    exports = kinds.add_parser("exports")
    exports.add_argument("networks", nargs="+")
    exports.add_argument("--variants", nargs="+", default=["torchscript-17", "dynamo-21"])
    for name in ("files", "compare"):
        kinds.add_parser(name).add_argument("paths", nargs="+", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if options.kind == "exports":
            print_exports(options.networks, options.variants, Path(folder))
        elif options.kind == "files":
            print_files(options.paths, Path(folder))
        else:
            print_comparison(options.paths, Path(folder))


def print_exports(networks: Sequence[str], variants: Sequence[str], folder: Path) -> None:
    """Networks in training form, exported without folding of constants and folded as files."""
    print("| network | export | as exported | folded file | folded network, exported | file / network |")
    print("|---|---|--:|--:|--:|--:|")
    image = torch.randn(1, 3, 224, 224)
    for name in networks:
        net = trained(timm.create_model(name) if timm.is_model(name) else refold.create_model(name))
        plain = refold.fold(net, image)
        for variant in variants:
            paths = [folder / f"{name}-{variant}-{kind}.onnx" for kind in ("training", "plain", "module")]
            export(net, paths[0], image, variant)
            export(plain, paths[2], image, variant)
            refold.fold(paths[0], paths[1], image)
            times = timed(paths, (image,))
            ratio = statistics.median(f / m for f, m in zip(times[1], times[2], strict=True))
            cells = [f"{contents(path)}, {milliseconds(own)}" for path, own in zip(paths, times, strict=True)]
            print(f"| {name} | {variant} | {' | '.join(cells)} | {ratio:.2f} |", flush=True)


def print_files(paths: Sequence[Path], folder: Path) -> None:
    """Files of others."""
    print("| file | nodes | convolutions | batch norms | ms | nodes folded | conv. | norms | ms | OpenVINO |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|---|")
    for path in paths:
        plain = folder / path.name
        try:
            refold.fold(path, plain)
        except refold.RefoldError as error:
            print(f"| {path.name} | {error} |", flush=True)
            continue
        example = example_of(read_network(path))
        try:
            before, after = (milliseconds(t) for t in timed([path, plain], example))
        except Exception as error:  # ONNX Runtime may refuse the original on random inputs
            before = after = str(error).splitlines()[0][:40]
        cells = [*counts(path), before, *counts(plain), after, loads_in_openvino(plain)]
        print(f"| {path.name} | {' | '.join(map(str, cells))} |", flush=True)


def print_comparison(paths: Sequence[Path], folder: Path) -> None:
    """The same file by other tools."""
    print("| file | as it is | onnxsim | onnxoptimizer | ONNX Runtime's own file | folded |")
    print("|---|--:|--:|--:|--:|--:|")
    for path in paths:
        made: dict[str, Path | str] = {"as it is": path}
        for name, tool in TOOLS.items():
            made[name] = folder / f"{path.stem}-{name}.onnx"
            try:
                tool(path, made[name])
            except Exception as error:  # each fails in its own way
                made[name] = str(error).splitlines()[0][:60]
        example = example_of(read_network(path))
        files = [each for each in made.values() if isinstance(each, Path)]
        times = dict(zip(files, timed(files, example), strict=True))
        cells = [
            f"{contents(each)}, {milliseconds(times[each])}" if isinstance(each, Path) else each
            for each in made.values()
        ]
        print(f"| {path.name} | {' | '.join(cells)} |", flush=True)


def _simplified(source: Path, target: Path) -> None:
    import onnxsim

    with contextlib.redirect_stdout(io.StringIO()):
        model, same = onnxsim.simplify(onnx.load(source))
    if not same:
        raise ValueError("onnxsim says that its file differs")
    onnx.save(model, target)


def _optimised(source: Path, target: Path) -> None:
    import onnxoptimizer

    passes = onnxoptimizer.get_fuse_and_elimination_passes()
    onnx.save(onnxoptimizer.optimize(onnx.load(source), passes, fixed_point=True), target)


def _by_runtime(source: Path, target: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


def _folded(source: Path, target: Path) -> None:
    refold.fold(source, target)


TOOLS: dict[str, Callable[[Path, Path], None]] = {
    "onnxsim": _simplified,
    "onnxoptimizer": _optimised,
    "runtime": _by_runtime,
    "folded": _folded,
}


def trained(net: nn.Module) -> nn.Module:
    """The network with statistics as after training, in evaluation mode."""
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.data = torch.randn(module.running_mean.shape, generator=generator) * 0.1
            module.running_var.data = torch.rand(module.running_var.shape, generator=generator) + 0.5
    return net.eval()


def export(net: nn.Module, path: Path, image: torch.Tensor, variant: str) -> None:
    """Export by one of PyTorch's exporters and an operator set, with a free batch, nothing folded or optimised."""
    exporter, _, opset = variant.partition("-")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        if exporter == "dynamo":
            shapes = ({0: torch.export.Dim("batch")},)
            program: Any = torch.onnx.export(
                net,
                (torch.cat([image, image]),),
                dynamo=True,
                optimize=False,
                opset_version=int(opset),
                dynamic_shapes=shapes,
                verbose=False,
            )
            program.save(path)
        else:
            torch.onnx.export(
                net,
                (image,),
                str(path),
                dynamo=False,
                do_constant_folding=False,
                training=torch.onnx.TrainingMode.PRESERVE,
                opset_version=int(opset),
                input_names=["image"],
                dynamic_axes={"image": {0: "batch"}},
            )


def running(path: Path, example: Sequence[torch.Tensor]) -> Callable[[], object]:
    """A call of a file in ONNX Runtime with one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {value.name: each.numpy() for value, each in zip(session.get_inputs(), example, strict=True)}
    session.run(None, feed)
    return lambda: session.run(None, feed)


def timed(paths: Sequence[Path], example: Sequence[torch.Tensor]) -> list[list[float]]:
    """Seconds a call, the shortest of a few in each round, all taking turns.

    Each is loaded several times, for where its tensors lie in memory makes some percent.
    """
    times: list[list[float]] = [[] for _ in paths]
    for _ in range(LOADED):
        calls = [running(path, example) for path in paths]
        for _ in range(ROUNDS):
            for call, own in zip(calls, times, strict=True):
                own.append(min(_seconds(call) for _ in range(CALLS)))
    return times


def _seconds(call: Callable[[], object]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


def milliseconds(times: Sequence[float]) -> str:
    """The median."""
    return f"{1000 * statistics.median(times):.2f}"


def counts(path: Path) -> tuple[int, int, int]:
    """Nodes, without constants that are nodes, convolutions and batch norms, in the graph itself."""
    kinds = Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)
    norms = kinds["BatchNormalization"]
    return kinds.total() - kinds["Constant"], kinds["Conv"] + kinds["FusedConv"], norms


def contents(path: Path) -> str:
    return "/".join(map(str, counts(path)))


def loads_in_openvino(path: Path) -> str:
    try:
        import openvino

        openvino.Core().compile_model(str(path), "CPU")
    except Exception as error:  # it raises what it likes
        return type(error).__name__
    return "loads"


if __name__ == "__main__":
    main()
