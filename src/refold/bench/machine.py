"""What a benchmark must say about the machine it ran on."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

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
class Machine:
    """The facts of a machine; `memory` in bytes, None where the system does not tell; `roofs` by threads."""

    cpu: str
    architecture: str
    cores: int
    memory: int | None
    system: str
    python: str
    versions: dict[str, str]
    note: str = ""
    roofs: dict[int, Roof] = field(default_factory=dict, compare=False)

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> Machine:
        """The machine that `dataclasses.asdict` and JSON made `facts` of."""
        roofs = {int(threads): Roof.from_dict(roof) for threads, roof in facts.get("roofs", {}).items()}
        return cls(**{**facts, "roofs": roofs})


def this_machine(note: str = "") -> Machine:
    """The facts of the machine that this runs on; `note` is what the user adds, such as "shared, 2 cores"."""
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
    )


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
