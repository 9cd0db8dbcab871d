"""What a benchmark must say about the machine it ran on."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

_PACKAGES = (
    "refold",
    "torch",
    "timm",
    "onnxruntime",
    "openvino",
    "ncnn",
    "MNN",
    "ai-edge-litert",
    "executorch",
)


@dataclass(frozen=True)
class Roof:
    """What a machine can do at best with some number of threads, measured by `refold.bench.roofline`.

    `flops` are floating-point operations a second of the fastest matrix product. `bandwidth` gives bytes moved a
    second for copies of several sizes: pairs of size in bytes and rate, smallest size first.
    """

    flops: float
    bandwidth: tuple[tuple[int, float], ...]

    @classmethod
    def from_dict(cls, roof: dict[str, Any]) -> Roof:
        """The roof that `dataclasses.asdict` and JSON made `roof` of."""
        return cls(roof["flops"], tuple((int(size), rate) for size, rate in roof["bandwidth"]))

    @property
    def memory_bandwidth(self) -> float:
        """Bytes a second of the largest copy, which fits no cache."""
        return self.bandwidth[-1][1]

    def bandwidth_at(self, size: float) -> float:
        """Bytes a second that a working set of `size` bytes can reach: the best of the copies at least as large."""
        return max(
            (rate for measured, rate in self.bandwidth if measured >= size), default=self.memory_bandwidth
        )


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA card; `memory` in bytes, `cuda` the version that PyTorch was built for.

    `driver` and `clocks` (what they were when last asked) are nvidia-smi's, empty where it does not answer.
    """

    name: str
    memory: int
    compute_capability: str
    cuda: str
    driver: str = ""
    clocks: str = field(default="", compare=False)

    def __str__(self) -> str:
        facts = [self.name, f"{self.memory / 2**30:.0f} GiB", f"CUDA {self.cuda}"]
        facts += [f"driver {self.driver}"] if self.driver else []
        return ", ".join([*facts, self.clocks] if self.clocks else facts)


@dataclass(frozen=True)
class Machine:
    """The facts of a machine; `memory` in bytes, None where the system does not tell; `roofs` by threads.

    `gpu` is the card of a benchmark that runs on one.
    """

    cpu: str
    architecture: str
    cores: int
    memory: int | None
    system: str
    python: str
    versions: dict[str, str]
    note: str = ""
    roofs: dict[int, Roof] = field(default_factory=dict, compare=False)
    gpu: Gpu | None = None

    @property
    def name(self) -> str:
        """What computes."""
        return self.cpu if self.gpu is None else self.gpu.name

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> Machine:
        """The machine that `dataclasses.asdict` and JSON made `facts` of."""
        roofs = {int(threads): Roof.from_dict(roof) for threads, roof in facts.get("roofs", {}).items()}
        gpu = facts.get("gpu")
        return cls(**{**facts, "roofs": roofs, "gpu": None if gpu is None else Gpu(**gpu)})


def this_machine(note: str = "", device: str = "cpu") -> Machine:
    """The facts of the machine that this runs on, for the device "cuda" with its card.

    `note` is what the user adds, such as "shared, 2 cores".
    """
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return Machine(
        cpu=_cpu_name(),
        architecture=platform.machine(),
        cores=_usable_cores(),
        memory=psutil.virtual_memory().total,
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        versions=versions,
        note=note,
        gpu=_this_gpu() if device == "cuda" else None,
    )


def _this_gpu() -> Gpu:
    facts = torch.cuda.get_device_properties(0)
    return Gpu(
        name=facts.name,
        memory=facts.total_memory,
        compute_capability=f"{facts.major}.{facts.minor}",
        cuda=torch.version.cuda or "",
        driver="".join(_ask_nvidia_smi("driver_version")),
    )


def clocks_now() -> str:
    """The clocks of the card that PyTorch uses, in words; empty where nvidia-smi does not answer."""
    found = _ask_nvidia_smi("clocks.sm", "clocks.max.sm", "clocks.mem")
    return "SM at {} of at most {}, memory at {}".format(*found) if found else ""


def _ask_nvidia_smi(*facts: str) -> list[str]:
    # By its number PyTorch may mean another card: CUDA_VISIBLE_DEVICES counts its own.
    card = f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}"
    command = ["nvidia-smi", card, f"--query-gpu={','.join(facts)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [fact.strip() for fact in answer.stdout.strip().split(",")]


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    for name in ("model name", "Model", "Hardware"):
        if facts.get(name):
            return facts[name]
    return platform.processor() or platform.machine() or "unknown CPU"


def _usable_cores() -> int:
    try:
        return len(psutil.Process().cpu_affinity())
    except AttributeError:  # macOS does not tell
        return psutil.cpu_count() or 1
