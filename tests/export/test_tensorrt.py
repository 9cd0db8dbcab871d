"""The TensorRT engine against a stand-in for its documented interface, whose engines run in ONNX Runtime.

Neither TensorRT nor a card is needed: what is tested is the order and the meaning of the calls, from the ONNX file to
outputs read back from their addresses. It cannot show that TensorRT itself accepts them.
"""

import contextlib
import ctypes
import enum
import json
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import refold
from refold.errors import InputError
from refold.export import checked, engines

IMAGE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class DataType(enum.Enum):
    FLOAT, HALF, INT32, INT64, BOOL = range(5)


class Network:
    def __init__(self, flags: int) -> None:
        assert flags == 1 << 1, "strongly typed"
        self.onnx = b""

    @property
    def num_inputs(self) -> int:
        return len(onnx.load_from_string(self.onnx).graph.input)

    def get_input(self, index: int) -> Any:
        value = onnx.load_from_string(self.onnx).graph.input[index]
        sizes = [axis.dim_value or -1 for axis in value.type.tensor_type.shape.dim]
        return SimpleNamespace(name=value.name, shape=sizes)


class Parser:
    error = ""

    def __init__(self, network: Network, logger: object) -> None:
        self.network = network
        self.num_errors = int(bool(self.error))

    def parse(self, content: bytes) -> bool:
        self.network.onnx = content
        return not self.error

    def get_error(self, index: int) -> Any:
        return SimpleNamespace(desc=lambda: self.error)


class Config:
    def __init__(self) -> None:
        self.flags = {"TF32"}
        self.profiles: list[dict[str, Any]] = []

    def clear_flag(self, flag: str) -> None:
        self.flags.discard(flag)

    def add_optimization_profile(self, profile: Any) -> None:
        self.profiles.append(profile.shapes)


class Builder:
    configs: ClassVar[list[Config]] = []

    def __init__(self, logger: object) -> None:
        pass

    def create_network(self, flags: int) -> Network:
        return Network(flags)

    def create_builder_config(self) -> Config:
        self.configs.append(Config())
        return self.configs[-1]

    def create_optimization_profile(self) -> Any:
        shapes: dict[str, Any] = {}
        return SimpleNamespace(
            shapes=shapes, set_shape=lambda name, low, best, most: shapes.update({name: (low, best, most)})
        )

    def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
        return None if config.flags else network.onnx


class Context:
    def __init__(self, engine: "Engine") -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self.shapes[name] = shape

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        (batch, *_) = next(iter(self.shapes.values()))
        return (batch, *self.engine.outputs[name][1:])

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        feed = {}
        for name, shape in self.shapes.items():
            memory = (ctypes.c_float * int(np.prod(shape))).from_address(self.addresses[name])
            feed[name] = np.frombuffer(memory, dtype=np.float32).reshape(shape)
        for name, result in zip(self.engine.outputs, self.engine.session.run(None, feed), strict=True):
            ctypes.memmove(self.addresses[name], result.astype(np.float32).tobytes(), result.nbytes)
        return True


class Engine:
    def __init__(self, content: bytes) -> None:
        self.session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = {value.name: value.shape for value in self.session.get_outputs()}

    @property
    def num_io_tensors(self) -> int:
        return len(self.inputs) + len(self.outputs)

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name in self.inputs else "out"

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType.FLOAT

    def create_execution_context(self) -> Context:
        return Context(self)


class Logger:
    ERROR = 1

    def __init__(self, severity: int) -> None:
        pass


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """A machine with TensorRT and a card; gives what engines were built with."""
    fake: Any = ModuleType("tensorrt")
    fake.__spec__ = ModuleSpec("tensorrt", None)
    fake.DataType, fake.Logger, fake.Builder, fake.OnnxParser = DataType, Logger, Builder, Parser
    fake.NetworkDefinitionCreationFlag = enum.IntEnum("Flag", {"STRONGLY_TYPED": 1})
    fake.BuilderFlag = SimpleNamespace(TF32="TF32")
    fake.TensorIOMode = SimpleNamespace(INPUT="in", OUTPUT="out")
    fake.Runtime = lambda logger: SimpleNamespace(
        deserialize_cuda_engine=lambda content: Engine(content) if content != b"old" else None
    )
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.delitem(sys.modules, "refold.export.tensorrt", raising=False)
    stream = SimpleNamespace(cuda_stream=0, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    engine = import_module("refold.export.tensorrt")
    # The process in which exported files are run knows no stand-in.
    monkeypatch.setattr(
        checked, "run_apart", lambda _, path, calls: [engine.open(path)(*arguments) for arguments in calls]
    )
    monkeypatch.setattr(engine, "_DEVICE", "cpu")
    monkeypatch.setattr(engine, "_has_card", lambda: True)
    Builder.configs = []
    Parser.error = ""
    yield Builder.configs
    sys.modules.pop("refold.export.tensorrt")


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4, 5)).eval()


@pytest.mark.parametrize("half", [False, True])
def test_built_run_and_compared(half: bool, card: list[Config], tmp_path: Path) -> None:
    path = tmp_path / "net.engine"
    report = refold.export(network(), path, IMAGE, engine="tensorrt", half=half, class_names=list("abcde"))
    assert report.checked
    assert report.batch_sizes == [1, 3]
    assert (report.relative_difference < 1e-6) != half, "float16 is in the file, not in a flag"
    (config,) = card
    assert config.profiles == [{"image": ((1, 3, 8, 8), (1, 3, 8, 8), (32, 3, 8, 8))}]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["net.engine", "net.engine.json"]
    beside = json.loads((tmp_path / "net.engine.json").read_text())
    assert json.loads(beside["class_names"]) == list("abcde")
    fixed = refold.export(network(), path, IMAGE, engine="tensorrt", dynamic_batch=False)
    assert fixed.batch_sizes == [1]
    assert card[-1].profiles == []


def test_what_tensorrt_cannot_read_is_said(card: list[Config], tmp_path: Path) -> None:
    Parser.error = "no importer for Sorcery."
    with pytest.raises(InputError, match=r"TensorRT cannot read the model: no importer for Sorcery\.$"):
        refold.export(network(), tmp_path / "net.engine", IMAGE, engine="tensorrt")
    assert list(tmp_path.iterdir()) == []


def test_without_a_card_it_says_how_to_build_elsewhere(
    card: list[Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["refold.export.tensorrt"], "_has_card", lambda: False)
    command = (
        r"trtexec --onnx=net\.onnx --saveEngine=net\.engine --stronglyTyped --noTF32 "
        r"--minShapes=image:1x3x8x8 --optShapes=image:2x3x8x8 --maxShapes=image:32x3x8x8$"
    )
    with pytest.raises(InputError, match=f"no NVIDIA card here; export for onnxruntime here.*{command}"):
        refold.export(network(), tmp_path / "net.engine", IMAGE.repeat(2, 1, 1, 1), engine="tensorrt")
    assert list(tmp_path.iterdir()) == []


def test_without_tensorrt_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'refold\[tensorrt\]' \(it needs an NVIDIA card"):
        engines.get_engine("tensorrt")
