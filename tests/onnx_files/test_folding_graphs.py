"""Graphs fold as networks do, whatever way they write it, and nothing else in them changes."""

import copy
import pickle
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from graphs import LARGEST, answers, check_fold, distance, kinds, model, norm, normal
from onnx import numpy_helper
from torch import nn

import refold
import refold.folding
from refold.bench.timing import Timing
from refold.onnx_files.reading import read_network
from refold.onnx_files.runtime import in_runtime

_TYPE = "double"


def _conv_norm(head: str = "", source: str = "x") -> str:
    return f"""g ({_TYPE}[N,3,H,W] x) => ({_TYPE}[N,4,H2,W2] y) {{
        {head}
        c = Conv <pads=[1,1,1,1]> ({source}, w)
        n = BatchNormalization (c, ns, nb, nm, nv)
        y = Relu (n) }}"""


IMAGE = (2, 3, 9, 7)
WEIGHT = normal(4, 3, 3, 3)


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 17, 21])
def test_a_norm_behind_a_convolution(opset: int) -> None:
    made = model(_conv_norm(), opset, w=WEIGHT, **norm(4))
    plain, report = check_fold(made, IMAGE, expected={"Conv": 1, "Relu": 1})
    assert report.before.batch_norms == 1
    assert report.after.operators == {"convolution": 1, "activation": 1}
    assert {tensor.name for tensor in plain.graph.initializer}.isdisjoint({"w", "ns", "nb", "nm", "nv"})


WEIGHTS = {
    "a constant": ("Constant", WEIGHT),
    "through an identity": ("w = Identity (w0)", WEIGHT),
    "transposed": ("w = Transpose <perm=[3,2,0,1]> (w0)", WEIGHT.transpose(2, 3, 1, 0)),
    "cast": (f"w = Cast <to={onnx.TensorProto.DOUBLE}> (w0)", WEIGHT.astype(np.float32)),
    "scaled": ("w = Mul (w0, w0)", WEIGHT),
}


@pytest.mark.parametrize("way", WEIGHTS)
def test_weights_are_found_however_they_are_given(way: str) -> None:
    head, value = WEIGHTS[way]
    if head == "Constant":
        made = model(_conv_norm(), **norm(4))
        tensor = numpy_helper.from_array(value, "value")
        made.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["w"], value=tensor))
    else:
        made = model(_conv_norm(head), w0=value, **norm(4))
    check_fold(made, IMAGE, expected={"Conv": 1, "Relu": 1})


def test_weights_that_were_quantised() -> None:
    head = "w = DequantizeLinear (w0, scale, zero)"
    whole = np.random.default_rng(0).integers(-100, 100, (4, 3, 3, 3)).astype(np.int8)
    text = _conv_norm(head).replace("double", "float")
    numbers = norm(4, np.float32)
    made = model(text, w0=whole, scale=np.float32(0.02), zero=np.int8(3), **numbers)
    plain, report = refold.fold(made, None, torch.randn(2, 3, 9, 7))
    assert kinds(plain) == {"Conv": 1, "Relu": 1}
    assert report.proof is not None
    assert report.proof.distance_float64 < LARGEST


def test_a_weight_of_two_convolutions() -> None:
    text = """g (double[N,4,H,W] x) => (double[N,4,H,W] y, double[N,4,H,W] z) {
        a = Conv <pads=[1,1,1,1]> (x, w)
        y = BatchNormalization (a, ns, nb, nm, nv)
        z = Conv <pads=[1,1,1,1]> (x, w) }"""
    made = model(text, w=normal(4, 4, 3, 3), **norm(4))
    plain, _ = check_fold(made, (1, 4, 6, 6), expected={"Conv": 2})
    assert "w" in {tensor.name for tensor in plain.graph.initializer}, "the other still reads it"


def test_a_norm_that_was_taken_apart() -> None:
    text = """g (double[N,3,H,W] x) => (double[N,4,H,W] y) {
        c = Conv <pads=[1,1,1,1]> (x, w)
        s = Sub (c, mean)
        v = Add (variance, epsilon)
        r = Sqrt (v)
        d = Div (s, r)
        m = Mul (gamma, d)
        y = Add (m, beta) }"""
    rows = {k: v.reshape(4, 1, 1) for k, v in norm(4, prefix="").items()}
    names = {"gamma": rows["s"], "beta": rows["b"], "mean": rows["m"], "variance": rows["v"]}
    check_fold(model(text, w=WEIGHT, epsilon=np.float64(1e-3), **names), IMAGE, expected={"Conv": 1})


def test_a_branch_block_with_an_identity_and_padding_apart() -> None:
    text = """g (double[N,4,H,W] x) => (double[N,4,H,W] y) {
        p = Pad (x, ends)
        a = Conv (p, w)
        b = Conv (x, u)
        i = Identity (x)
        n = BatchNormalization (i, ns, nb, nm, nv)
        s = Sum (a, b)
        t = Add (s, n)
        y = Relu (t) }"""
    ends = np.array([0, 0, 1, 1, 0, 0, 1, 1])
    made = model(text, w=normal(4, 4, 3, 3), u=normal(4, 4, 1, 1), ends=ends, **norm(4))
    check_fold(made, (2, 4, 9, 7), expected={"Conv": 1, "Relu": 1})


def test_an_average_behind_a_pointwise_convolution() -> None:
    text = """g (double[N,3,H,W] x) => (double[N,4,H2,W2] y) {
        c = Conv (x, w)
        a = AveragePool <kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1], count_include_pad=1> (c)
        n = BatchNormalization (a, ns, nb, nm, nv)
        k = Conv <pads=[1,1,1,1], strides=[2,2]> (x, u)
        y = Add (n, k) }"""
    made = model(text, w=normal(4, 3, 1, 1), u=WEIGHT, **norm(4))
    check_fold(made, IMAGE, expected={"Conv": 1})


def test_padding_that_differs_between_the_ends_stays_in_the_convolution() -> None:
    text = _conv_norm().replace("[1,1,1,1]", "[0,1,2,1], strides=[2,2]")
    plain, _ = check_fold(model(text, w=WEIGHT, **norm(4)), IMAGE, expected={"Conv": 1, "Relu": 1})
    assert list(next(a.ints for a in plain.graph.node[0].attribute if a.name == "pads")) == [0, 1, 2, 1]


@pytest.mark.parametrize("padding", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("stride", [1, 2])
def test_padding_that_the_file_leaves_to_the_engine(padding: str, stride: int) -> None:
    text = _conv_norm().replace("pads=[1,1,1,1]", f'auto_pad="{padding}", strides=[{stride},{stride}]')
    text = text.replace("[N,3,H,W]", "[N,3,9,8]").replace("double", "float")
    made = model(text, **_narrow({"w": WEIGHT, **norm(4)}))
    plain, report = refold.fold(made)
    assert kinds(plain) == {"Conv": 1, "Relu": 1}
    assert report.proof is not None
    assert report.proof.distance_float64 < LARGEST
    image = torch.randn(2, 3, 9, 8)
    before, after = (in_runtime(each.SerializeToString(), ["x"], [image]) for each in (made, plain))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_padding_that_depends_on_a_free_size_is_left() -> None:
    text = _conv_norm().replace("pads=[1,1,1,1]", 'auto_pad="SAME_UPPER", strides=[2,2]')
    made = model(text, w=WEIGHT, **norm(4))
    plain, report = check_fold(made, IMAGE)
    assert kinds(plain) == kinds(made)
    assert len(report.left) == 1


def test_groups_dilation_and_a_transposed_convolution() -> None:
    text = """g (double[N,4,H,W] x) => (double[N,6,H2,W2] y) {
        a = Conv <group=2, dilations=[2,2], pads=[2,2,2,2]> (x, w)
        b = BatchNormalization (a, ns, nb, nm, nv)
        r = Relu (b)
        t = ConvTranspose <strides=[2,2], output_padding=[1,1], group=2> (r, u)
        y = BatchNormalization (t, ts, tb, tm, tv) }"""
    weights = {"w": normal(4, 2, 3, 3), "u": normal(4, 3, 3, 3)}
    made = model(text, **weights, **norm(4), **norm(6, prefix="t"))
    plain, report = check_fold(made)  # the reference implementation has no groups of transposed convolutions
    assert report.proof.distance_float64 < LARGEST
    assert kinds(plain) == {"Conv": 1, "Relu": 1, "ConvTranspose": 1}


@pytest.mark.parametrize(
    "product",
    [
        "p = Gemm <transB=1> (x, w, b)",
        "p = Gemm <transB=0, alpha=0.5, beta=2.0> (x, v, b)",
        "m = MatMul (x, v) p = Add (m, b)",
        "m = MatMul (x, v) p = Add (b, m)",
    ],
)
def test_linear_layers_and_a_norm(product: str) -> None:
    text = f"g (double[N,5] x) => (double[N,4] y) {{ {product} y = BatchNormalization (p, ns, nb, nm, nv) }}"
    weight = normal(4, 5)
    made = model(text, w=weight, v=weight.T.copy(), b=normal(4), **norm(4))
    check_fold(made, (3, 5), expected={"Gemm": 1})


def test_a_linear_layer_of_more_axes() -> None:
    text = """g (double[N,T,5] x) => (double[N,T,3] y) {
        a = MatMul (x, v) b = Add (a, c) d = MatMul (b, w) y = Mul (d, half) }"""
    made = model(text, v=normal(5, 4), c=normal(4), w=normal(4, 3), half=np.float64(0.5))
    check_fold(made, (2, 7, 5), expected={"MatMul": 1, "Add": 1})


def test_a_norm_pushed_through_a_global_average_and_a_reshape() -> None:
    text = """g (double[N,3,H,W] x) => (double[N,2] y) {
        c = Conv (x, w)
        r = Relu (c)
        n = BatchNormalization (r, ns, nb, nm, nv)
        a = GlobalAveragePool (n)
        f = Flatten <axis=1> (a)
        y = Gemm <transB=1> (f, u, b) }"""
    made = model(text, w=WEIGHT, u=normal(2, 4), b=normal(2), **norm(4))
    check_fold(made, IMAGE, expected={"Conv": 1, "Relu": 1, "GlobalAveragePool": 1, "Flatten": 1, "Gemm": 1})


def test_channels_taken_apart_and_put_together() -> None:
    text = """g (double[N,4,H,W] x) => (double[N,4,H,W] y) {
        a, b = Split <axis=1> (x, sizes)
        c = Conv <pads=[1,1,1,1], group=2> (a, w)
        d = Slice (b, zero, two, one)
        e = Concat <axis=1> (c, d)
        y = BatchNormalization (e, ns, nb, nm, nv) }"""
    whole = {"sizes": np.array([2, 2]), "zero": np.array([0]), "two": np.array([2]), "one": np.array([1])}
    made = model(text, w=normal(2, 1, 3, 3), **whole, **norm(4))
    _, report = check_fold(made, (2, 4, 6, 5), objective="operators", expected={"Conv": 1})
    assert report.options["objective"] == "operators"


def test_a_norm_in_training_mode_is_left_and_said() -> None:
    text = _conv_norm().replace("BatchNormalization (", "BatchNormalization <training_mode=1> (")
    made = model(text, w=WEIGHT, **norm(4))
    plain, report = refold.fold(made, None, torch.from_numpy(normal(*IMAGE)))
    assert kinds(plain)["BatchNormalization"] == 1
    assert [reason for _, reason in report.left] == ["it is used in training mode"]


@pytest.mark.parametrize("training", [False, True])
def test_what_only_training_changes(training: bool) -> None:
    flag = "t" if training else "f"
    text = _conv_norm().replace("y = Relu (n)", f"d = Dropout (n, ratio, {flag}) y = Relu (d)")
    flags = {"ratio": np.float32(0.5), "t": np.array(True), "f": np.array(False)}
    made = model(text, w=WEIGHT, **flags, **norm(4))
    if not training:
        check_fold(made, IMAGE, expected={"Conv": 1, "Dropout": 1, "Relu": 1})
    else:
        plain, _ = refold.fold(made, None, torch.from_numpy(normal(*IMAGE)), prove=False)
        assert kinds(plain) == {"Conv": 1, "Dropout": 1, "Relu": 1}


def test_constants_that_are_inputs_as_well() -> None:
    made = model(_conv_norm(), ir_version=3, w=WEIGHT, **norm(4))
    for tensor in made.graph.initializer:
        shape = list(tensor.dims)
        made.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, shape))
    plain, report = refold.fold(made, None, torch.from_numpy(normal(*IMAGE)))
    onnx.checker.check_model(plain, full_check=True)
    assert distance(made, plain, [normal(*IMAGE)]) < LARGEST
    held = {tensor.name for tensor in plain.graph.initializer}
    assert [value.name for value in plain.graph.input if value.name not in held] == ["x"]
    assert any("5 inputs have values in the file (w, ns, nb and 2 more)" in note for note in report.notes)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype: str) -> None:
    text = _conv_norm().replace("double", dtype)
    if dtype == "float16":
        made = model(text, w=WEIGHT.astype(np.float16), **norm(4, np.float16))
    else:
        made = model(text, 22, 10)
        for name, value in {"w": WEIGHT, **norm(4)}.items():
            flat = value.astype(np.float32).flatten().tolist()
            made.graph.initializer.append(
                onnx.helper.make_tensor(name, onnx.TensorProto.BFLOAT16, value.shape, flat)
            )
    plain, report = refold.fold(made, None, torch.randn(1, 3, 9, 7).to(getattr(torch, dtype)))
    onnx.checker.check_model(plain, full_check=True)
    assert kinds(plain) == {"Conv": 1, "Relu": 1}
    assert {tensor.data_type for tensor in plain.graph.initializer} == {
        onnx.TensorProto.DataType.Value(dtype.upper())
    }
    assert report.proof is not None
    assert report.proof.distance_float64 < LARGEST


def test_a_value_that_a_subgraph_reads() -> None:
    text = """g (double[N,3,H,W] x, bool c) => (double[N,4,H2,W2] y) {
        v = Conv <pads=[1,1,1,1]> (x, w)
        n = BatchNormalization (v, ns, nb, nm, nv)
        y = If (c) <then_branch = t () => (double[N,4,H2,W2] a) { a = Relu (n) },
                    else_branch = e () => (double[N,4,H2,W2] b) { b = Neg (n) }> }"""
    made = model(text, w=WEIGHT, **norm(4))
    x = normal(*IMAGE)
    for way in (True, False):
        plain, _ = refold.fold(made, None, (torch.from_numpy(x), torch.tensor(way)))
        onnx.checker.check_model(plain, full_check=True)
        assert kinds(plain) == {"Conv": 1, "If": 1}
        for other in (True, False):
            assert distance(made, plain, [x, np.array(other)]) < LARGEST


def test_what_a_subgraph_decides_by_may_be_one_flag() -> None:
    text = """g (double[N,3,H,W] x, bool c) => (double[N,4,H2,W2] y) {
        v = Conv <pads=[1,1,1,1]> (x, w) n = BatchNormalization (v, ns, nb, nm, nv)
        y = If (c) <then_branch = t () => (double[N,4,H3,W3] a) { a = Relu (n) },
            else_branch = e () => (double[N,4,H4,W4] b) { b = Neg (n) }> }"""
    plain, report = refold.fold(model(text, w=WEIGHT, **norm(4)))
    assert kinds(plain) == {"Conv": 1, "If": 1}
    assert report.proof is not None


def test_inputs_whose_axes_have_one_name() -> None:
    text = """g (double[N,3,H,V] x, double[V,K] u) => (double[N,4,H,K] y) {
        c = Conv <pads=[1,1,1,1]> (x, w) n = BatchNormalization (c, ns, nb, nm, nv) y = MatMul (n, u) }"""
    plain, _ = refold.fold(model(text, w=WEIGHT, **norm(4)))
    assert kinds(plain) == {"Conv": 1, "MatMul": 1}


@pytest.mark.parametrize("terms", ["a, b, x", "a, b, b, x", "a, r, b"])
def test_a_sum_of_several(terms: str) -> None:
    text = f"""g (double[N,4,H,W] x) => (double[N,4,H,W] y) {{
        a = Conv <pads=[1,1,1,1]> (x, w) b = Conv (x, u) r = Relu (x)
        s = Sum ({terms}) y = Relu (s) }}"""
    plain, _ = check_fold(model(text, w=normal(4, 4, 3, 3), u=normal(4, 4, 1, 1)), (2, 4, 9, 8))
    assert kinds(plain)["Conv"] == 1


def test_what_is_said_of_an_output_stays() -> None:
    text = _conv_norm().replace("y = Relu (n)", "q = Relu (n)").replace("[N,4,H2,W2] y", "[N,4,H2,W2] n")
    made = model(text, w=WEIGHT, **norm(4))
    output = made.graph.output[0]
    output.doc_string = "logits"
    output.metadata_props.add(key="kind", value="class")
    output.type.denotation = "TENSOR"
    output.type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
    plain, _ = check_fold(made, IMAGE)
    assert kinds(plain)["BatchNormalization"] == 0
    assert plain.graph.output == made.graph.output


def test_what_is_left_out_of_a_file_is_said() -> None:
    made = model(_conv_norm(), w=WEIGHT, **norm(4))
    made.training_info.add().initialization.name = "start"
    _, report = refold.fold(made, None, torch.from_numpy(normal(*IMAGE)))
    assert report.notes[0] == "how the file is trained (training_info) was left out"


def test_functions_are_written_out_and_said() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
        g (double[N,3,H,W] x) => (double[N,4,H,W] y) { y = own.block (x, w, ns, nb, nm, nv) }
        <domain: "own", opset_import: ["" : 17]>
        block (x, w, s, b, m, v) => (r) {
            c = Conv <pads=[1,1,1,1]> (x, w) n = BatchNormalization (c, s, b, m, v) r = Relu (n) }"""
    made = onnx.parser.parse_model(text)
    for name, value in {"w": WEIGHT, **norm(4)}.items():
        made.graph.initializer.append(numpy_helper.from_array(value, name))
    plain, report = refold.fold(made, None, torch.from_numpy(normal(*IMAGE)))
    assert kinds(plain) == {"Conv": 1, "Relu": 1}
    assert report.notes[0] == "functions of the file were written out where they are called (block)"
    assert distance(made, plain, [normal(*IMAGE)]) < LARGEST


def test_what_is_not_folded_stays_as_it_is() -> None:
    text = """g (double[batch,3,H,W] x, double[batch,4] z) => (double[batch,4,H2,W2] y, double[batch,k] q) {
        c = Conv <pads=[1,1,1,1]> (x, w)
        n = BatchNormalization (c, ns, nb, nm, nv)
        s = Sigmoid (n)
        y = HardSwish (s)
        order, place = TopK <axis=1, largest=0> (z, two)
        q = Softmax <axis=1> (order) }"""
    made = model(text, w=WEIGHT, two=np.array([2]), **norm(4))
    for index, node in enumerate(made.graph.node):
        node.name, node.doc_string = f"node {index}", f"what {index} is"
    made.producer_name, made.doc_string, made.graph.doc_string = "somebody", "a model", "a graph"
    onnx.helper.set_model_props(made, {"stride": "32", "names": "['a', 'b']"})
    plain, _ = refold.fold(made, None, (torch.from_numpy(normal(*IMAGE)), torch.from_numpy(normal(2, 4))))
    assert plain.graph.input == made.graph.input
    assert plain.graph.output == made.graph.output
    assert {p.key: p.value for p in plain.metadata_props} == {p.key: p.value for p in made.metadata_props}
    assert (plain.producer_name, plain.doc_string) == (made.producer_name, made.doc_string)
    assert plain.graph.doc_string == made.graph.doc_string
    assert (plain.ir_version, plain.opset_import) == (made.ir_version, made.opset_import)
    same = ir.to_proto(ir.from_proto(made))
    assert list(plain.graph.node)[1:] == list(same.graph.node)[2:]
    assert plain.graph.node[0].output == ["n"], "the new one has the name of what it stands for"


def test_a_file_without_anything_to_fold_stays_the_same() -> None:
    text = "g (float[N,3] x) => (float[N,3] y) { a = Relu (x) b = Softmax <axis=1> (a) y = Add (a, b) }"
    made = model(text)
    plain, report = refold.fold(made)
    assert plain == ir.to_proto(ir.from_proto(made))
    assert report.regions == []


def test_folding_twice_changes_nothing() -> None:
    once, _ = refold.fold(model(_conv_norm(), w=WEIGHT, **norm(4)), None, torch.from_numpy(normal(*IMAGE)))
    twice, report = refold.fold(once, None, torch.from_numpy(normal(*IMAGE)))
    assert twice == once
    assert report.regions == []


def test_a_graph_that_becomes_one_layer_and_an_output_that_is_an_input() -> None:
    text = """g (double[N,3,H,W] x) => (double[N,4,H2,W2] y) {
        c = Conv <pads=[1,1,1,1]> (x, w) y = BatchNormalization (c, ns, nb, nm, nv) }"""
    check_fold(model(text, w=WEIGHT, **norm(4)), IMAGE, expected={"Conv": 1})
    text = "g (double[N,3] x) => (double[N,3] y, double[N,3] z) { y = Mul (x, one) z = Identity (x) }"
    plain, _ = refold.fold(model(text, one=np.float64(1.0)), None, torch.from_numpy(normal(2, 3)))
    assert all(np.array_equal(found, normal(2, 3)) for found in answers(plain, [normal(2, 3)]))


def test_models_of_onnx_ir_and_free_sizes() -> None:
    made = ir.from_proto(
        model(_conv_norm().replace("double", "float"), w=WEIGHT.astype(np.float32), **norm(4, np.float32))
    )
    plain, report = refold.fold(made)
    assert isinstance(plain, ir.Model)
    assert [node.op_type for node in plain.graph] == ["Conv", "Relu"]
    assert report.proof.inputs[0] == "1×3×224×224"
    assert len(report.proof.inputs) == 2
    assert len(list(made.graph)) == 3, "the given one is untouched"


@pytest.mark.parametrize(
    "gelu",
    [
        "d = Div (n, root) e = Erf (d) a = Add (e, one) m = Mul (n, a) g = Mul (m, half)",
        "d = Mul (n, half) e = Erf (d) a = Add (e, one) h = Mul (n, half) g = Mul (h, a)",
    ],
)
def test_an_activation_in_several_nodes_stays_whole(gelu: str) -> None:
    """Engines recognise it; without its last factor, which could go into a convolution, they do not."""
    text = f"""g (double[N,3,H,W] x) => (double[N,2,H2,W2] y) {{
        c = Conv <pads=[1,1,1,1]> (x, w) n = BatchNormalization (c, ns, nb, nm, nv)
        {gelu} y = Conv (g, u) }}"""
    numbers = {"root": np.float64(2**0.5), "one": np.float64(1), "half": np.array([0.5])}
    made = model(text, w=WEIGHT, u=normal(2, 4, 1, 1), **numbers, **norm(4))
    plain, _ = check_fold(made, IMAGE)
    assert kinds(plain) == kinds(made) - Counter({"BatchNormalization": 1})


def test_shortcuts() -> None:
    text = """g (double[N,4,H,W] x) => (double[N,4,H,W] y) {
        a = Conv <pads=[1,1,1,1]> (x, w)
        b = Conv <pads=[1,1,1,1]> (a, u)
        y = Add (x, b) }"""
    made = model(text, w=normal(4, 4, 3, 3), u=normal(4, 4, 3, 3))
    plain, _ = check_fold(made, (1, 4, 9, 9), shortcuts="fold")
    assert kinds(plain) == {"Conv": 2}


class _Faster:
    """Says that whatever is changed takes half the time."""

    def __call__(self, networks: Sequence[nn.Module], example: torch.Tensor) -> tuple[Timing, ...]:
        for network in networks:
            network(example)
        return tuple(Timing((1.0 / (1 + index),) * 5) for index, _ in enumerate(networks))


def test_rewrites_that_are_measured() -> None:
    """A ghost module and what reads it, computed in halves."""
    text = """g (float[N,3,H,W] x) => (float[N,8,H2,W2] y) {
        c = Conv <pads=[1,1,1,1]> (x, w) n = BatchNormalization (c, ns, nb, nm, nv) r = Relu (n)
        d = Conv <pads=[1,1,1,1], group=4> (r, u) e = Relu (d)
        k = Concat <axis=1> (r, e) s = HardSwish (k) y = Conv (s, v) }"""
    weights = {"w": normal(4, 3, 3, 3), "u": normal(4, 1, 3, 3), "v": normal(8, 8, 1, 1)}
    made = model(text, **_narrow({**weights, **norm(4)}))
    objective = refold.Latency("onnxruntime", stopwatch=_Faster())
    example = torch.randn(1, 3, 12, 12)
    plain, report = refold.fold(made, None, example, objective=objective)
    assert report.options["rewrites"]
    assert kinds(plain)["Concat"] == 0
    assert kinds(plain)["HardSwish"] == 2, "one for each half"
    onnx.checker.check_model(plain, full_check=True)
    assert distance(made, plain, [example.numpy()]) < 1e-5


def test_an_onnx_network_is_exported_as_its_own_file(tmp_path: Path) -> None:
    made = model(_conv_norm().replace("double", "float"), **_narrow({"w": WEIGHT, **norm(4)}))
    onnx.helper.set_model_props(made, {"stride": "32"})
    onnx.save(made, tmp_path / "net.onnx")
    network = read_network(tmp_path / "net.onnx")
    image = torch.randn(1, 3, 12, 12)
    report = refold.export(network, tmp_path / "out.onnx", image)
    assert report.form == "plain"
    found = onnx.load(tmp_path / "out.onnx")
    assert kinds(found) == {"Conv": 1, "Relu": 1}
    assert found.graph.input == made.graph.input, "free sizes and all"
    assert {"stride", "producer"} <= {entry.key for entry in found.metadata_props}


def test_a_network_that_was_read_copies_and_pickles() -> None:
    made = model(_conv_norm().replace("double", "float"), **_narrow({"w": WEIGHT, **norm(4)}))
    network, image = read_network(made), torch.randn(2, 3, 9, 9)
    plain: Any = refold.folding.fold(network, image)
    for each in (network, plain):
        for other in (copy.deepcopy(each), pickle.loads(pickle.dumps(each))):
            assert torch.equal(other(image), each(image))


def _narrow(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: value.astype(np.float32) for name, value in tensors.items()}
