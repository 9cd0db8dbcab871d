"""A file that cannot be folded is said in one sentence, and nothing is half-written."""

from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from graphs import kinds, model, norm, normal

import refold

TEXT = """g (float[N,3,8,8] x) => (float[N,4,8,8] y) {
    c = Conv <pads=[1,1,1,1]> (x, w) n = BatchNormalization (c, ns, nb, nm, nv) y = Relu (n) }"""


def good() -> onnx.ModelProto:
    return model(TEXT, w=normal(4, 3, 3, 3, dtype=np.float32), **norm(4, np.float32))


def _without(name: str) -> onnx.ModelProto:
    made = good()
    kept = [tensor for tensor in made.graph.initializer if tensor.name != name]
    del made.graph.initializer[:]
    made.graph.initializer.extend(kept)
    return made


def _whole_numbers() -> onnx.ModelProto:
    made = good()
    made.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.ones((4, 3, 3, 3), np.int64), "w"))
    return made


def _cut_tensor() -> onnx.ModelProto:
    made = good()
    made.graph.initializer[0].raw_data = made.graph.initializer[0].raw_data[:-40]
    return made


def _circle() -> onnx.ModelProto:
    return model("g (float[N,3] x) => (float[N,3] y) { a = Add (x, b) b = Relu (a) y = Relu (b) }")


def _twice() -> onnx.ModelProto:
    return model("g (float[N,3] x) => (float[N,3] y) { a = Relu (x) a = Relu (x) y = Relu (a) }")


def _held_twice() -> onnx.ModelProto:
    made = good()
    made.graph.initializer.append(made.graph.initializer[0])
    return made


def _sparse(*, node: bool) -> onnx.ModelProto:
    made = model("g (float[N,8] x) => (float[N,8] y) { y = Add (x, s) }")
    value, place = (onnx.numpy_helper.from_array(np.array([number])) for number in (np.float32(2), 1))
    value.name = "s"
    tensor = onnx.helper.make_sparse_tensor(value, place, [8])
    if node:
        made.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["s"], sparse_value=tensor))
    else:
        made.graph.sparse_initializer.append(tensor)
    return made


def _texts() -> onnx.ModelProto:
    return model("g (string[N] x) => (string[N] y) { y = Identity (x) }")


def _old() -> onnx.ModelProto:
    return model(TEXT, opset=6, w=normal(4, 3, 3, 3, dtype=np.float32), **norm(4, np.float32))


def _unknown() -> onnx.ModelProto:
    return onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17, "vendor" : 1]> '
        "g (float[N,3] x) => (float[N,3] y) { y = vendor.Secret (x) }"
    )


BAD: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "no values of a weight": (lambda: _without("w"), "reads 'w', which nothing writes"),
    "whole numbers as a weight": (_whole_numbers, "does not run on random inputs"),
    "a tensor that is cut off": (_cut_tensor, "bad.onnx is no valid ONNX graph"),
    "a circle": (_circle, "reads 'b' before it is written"),
    "a value that is written twice": (_twice, "writes 'a', which is there already"),
    "a constant that is there twice": (_held_twice, "holds the constant 'w' more than once"),
    "a sparse constant": (lambda: _sparse(node=False), "holds the sparse constant 's'"),
    "a sparse constant as a node": (lambda: _sparse(node=True), "holds the sparse constant 's'"),
    "texts": (_texts, "The input 'x' of bad.onnx is no tensor of numbers"),
    "operators of long ago": (_old, "has version 6 of ONNX's operators, and 7 is the oldest"),
    "an operator that nobody knows": (_unknown, "The operator Secret of vendor cannot be computed"),
    "no graph": (onnx.ModelProto, "has no graph"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_graphs_are_refused_in_a_sentence(fault: str, tmp_path: Path) -> None:
    make, message = BAD[fault]
    path = tmp_path / "bad.onnx"
    path.write_bytes(make().SerializeToString())
    with pytest.raises(refold.InputError, match=message) as raised:
        refold.fold(path, tmp_path / "plain.onnx")
    assert str(raised.value).count("\n") == 0
    assert [file.name for file in tmp_path.iterdir()] == ["bad.onnx"]


def test_files_that_are_cut_off_or_none(tmp_path: Path) -> None:
    whole = good().SerializeToString()
    for size in (len(whole) - 1, len(whole) // 2, 100, 10):
        (tmp_path / "cut.onnx").write_bytes(whole[:size])
        with pytest.raises(refold.InputError, match=r"cut.onnx"):
            refold.fold(tmp_path / "cut.onnx", tmp_path / "plain.onnx")
    (tmp_path / "text.onnx").write_text("this is no graph")
    with pytest.raises(refold.InputError, match=r"text.onnx"):
        refold.fold(tmp_path / "text.onnx", tmp_path / "plain.onnx")
    with pytest.raises(refold.InputError, match="There is no file"):
        refold.fold(tmp_path / "none.onnx", tmp_path / "plain.onnx")
    assert not (tmp_path / "plain.onnx").exists()


def test_places_that_cannot_be_written_are_said_first(tmp_path: Path) -> None:
    onnx.save(good(), tmp_path / "net.onnx")
    with pytest.raises(refold.InputError, match="does not exist"):
        refold.fold(tmp_path / "net.onnx", tmp_path / "missing" / "plain.onnx")
    with pytest.raises(refold.InputError, match=r"give a name that ends in \.onnx"):
        refold.fold(tmp_path / "net.onnx", tmp_path / "plain.safetensors")
    with pytest.raises(refold.InputError, match="give its path"):
        refold.fold(tmp_path / "net.onnx")  # type: ignore[call-overload]  # that is the mistake
    with pytest.raises(refold.InputError, match="neither a network of PyTorch"):
        refold.fold(3, 4)  # type: ignore[call-overload]  # as above


def test_inputs_that_the_file_does_not_take(tmp_path: Path) -> None:
    for example, message in (
        (torch.randn(1, 3, 9, 9), r"is \?x3x8x8, not 1x3x9x9"),
        ((torch.randn(1, 3, 8, 8), torch.randn(1)), "takes 1 inputs, not 2"),
        ([1, 2], "a tensor for each of its inputs"),
    ):
        with pytest.raises(refold.InputError, match=message):
            refold.fold(good(), None, example)


def external(folder: Path) -> Path:
    """A file with its tensors beside it."""
    path = folder / "net.onnx"
    onnx.save(
        good(),
        path,
        save_as_external_data=True,
        location="net.weights",
        size_threshold=0,
        convert_attribute=False,
    )
    return path


def test_tensors_beside_a_file_stay_beside(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = external(tmp_path / "in")
    plain = tmp_path / "plain.onnx"
    report = refold.fold(path, plain)
    assert report.after.batch_norms == 0
    assert {file.name for file in tmp_path.iterdir()} == {"in", "plain.onnx", "plain.onnx.data"}
    read = onnx.load(plain)
    assert kinds(read) == {"Conv": 1, "Relu": 1}
    onnx.checker.check_model(str(plain), full_check=True)
    assert refold.verify(path, plain).distance_float64 < 1e-6
    refold.fold(plain, plain)
    assert refold.verify(path, plain).distance_float64 < 1e-6, "a file may be folded into its own place"


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", ""])
def test_tensors_outside_of_the_folder_are_not_read(location: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_bytes(bytes(10_000))
    path = external(tmp_path / "in")
    made = onnx.load(path, load_external_data=False)
    for tensor in made.graph.initializer:
        next(entry for entry in tensor.external_data if entry.key == "location").value = location
    path.write_bytes(made.SerializeToString())
    with pytest.raises(refold.InputError, match="outside of its own folder"):
        refold.fold(path, tmp_path / "plain.onnx")


def test_tensors_that_are_missing_or_cut_off(tmp_path: Path) -> None:
    path = external(tmp_path)
    weights = tmp_path / "net.weights"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(refold.InputError, match=r"'net\.weights' beside net\.onnx is cut off"):
        refold.fold(path, tmp_path / "plain.onnx")
    weights.unlink()
    with pytest.raises(refold.InputError, match=r"lies in 'net\.weights', which is not beside it"):
        refold.fold(path, tmp_path / "plain.onnx")
    in_memory = onnx.load(path, load_external_data=False)
    with pytest.raises(refold.InputError, match="give the path of the ONNX file"):
        refold.fold(in_memory)


def test_a_failed_proof_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx.save(good(), tmp_path / "net.onnx")
    (tmp_path / "plain.onnx").write_bytes(b"old")

    from refold.onnx_files.runtime import in_runtime

    for everywhere, message in ((False, "do not compute the same"), (True, "what net.onnx was read as")):

        def broken(file: Any, *given: Any, everywhere: bool = everywhere) -> list[torch.Tensor]:
            wrong = everywhere or file != tmp_path / "net.onnx"
            return [value * (1 + wrong) for value in in_runtime(file, *given)]

        monkeypatch.setattr("refold.onnx_files.folding.in_runtime", broken)
        with pytest.raises(refold.NotEquivalent, match=message):
            refold.fold(tmp_path / "net.onnx", tmp_path / "plain.onnx")
    assert (tmp_path / "plain.onnx").read_bytes() == b"old"
    assert {file.name for file in tmp_path.iterdir()} == {"net.onnx", "plain.onnx"}


@pytest.mark.slow
def test_ten_thousand_nodes() -> None:
    """Bounded time: no step looks at all pairs of nodes."""
    lines = []
    for i in range(2500):
        lines.append(f"c{i} = Conv <group=4> (r{i - 1}, w)" if i else "c0 = Conv <group=4> (x, w)")
        lines.append(
            f"n{i} = BatchNormalization (c{i}, ns, nb, nm, nv) a{i} = Add (n{i}, c{i}) r{i} = Sigmoid (a{i})"
        )
    text = f"g (float[1,4,2,2] x) => (float[1,4,2,2] r2499) {{ {chr(10).join(lines)} }}"
    made = model(text, w=normal(4, 1, 1, 1, dtype=np.float32), **norm(4, np.float32))
    start = perf_counter()
    plain, report = refold.fold(made)
    assert len(made.graph.node) == 10_000
    assert kinds(plain) == {"Conv": 2500, "Sigmoid": 2500}
    assert report.proof is not None
    print(f"{perf_counter() - start:.0f} s")
