"""Rebuild the weights and the input of the golden records of official networks.

A record names the keys and shapes of an official checkpoint and lists the logits that the official code
gives for weights and an input that anyone can draw again; the rule is in the functions below. The
records lie beside the repository, in ``../shared/reference/golden``; tests that need them skip where
they are absent.
"""

import json
from math import prod
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from torch import Tensor, nn

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "reference" / "golden"


def golden_record(name: str) -> dict[str, Any]:
    """The record of an official network, such as ``RepVGG_A0``; skips the calling test where it is absent."""
    path = FOLDER / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"the golden record {path} is not here")
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def golden_state_dict(record: dict[str, Any], kind: str = "state_dict") -> dict[str, Tensor]:
    """The weights of a record in float64, by official key name; ``kind`` names the record's list of keys."""
    return {key: _draw(key, shape, record["gain"]) for key, shape in record[kind]}


def drawn_weights(module: nn.Module, gain: float = 1.0) -> dict[str, Tensor]:
    """Weights and batch norm statistics for any module, by the rule of the records: nothing is 0 or 1."""
    return {key: _draw(key, list(value.shape), gain) for key, value in module.state_dict().items()}


def golden_input(record: dict[str, Any]) -> Tensor:
    """The input of a record: normal numbers of shape ``input_size`` in float64; most records check them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(record["input_size"], generator=generator, dtype=torch.float64)
    if "input_check" in record:
        drawn = torch.cat([x.flatten()[:4], x.sum().reshape(1)])
        expected = torch.tensor([float(value) for value in record["input_check"]], dtype=torch.float64)
        assert torch.allclose(drawn, expected, rtol=1e-12, atol=1e-9), "this torch draws other random numbers"
    return x


def assert_golden_logits(logits: Tensor, record: dict[str, Any], relative: float = 1e-9) -> None:
    """Compare logits ``(1, classes)`` with the record's first 32, mean, std and argmax."""
    logits = logits.flatten()
    std = float(record["std"])
    expected = torch.tensor([float(value) for value in record["logits"]], dtype=torch.float64)
    assert logits.numel() == record["num_classes"]
    assert (logits[:32] - expected).abs().max().item() <= relative * std
    assert abs(logits.mean().item() - float(record["mean"])) <= relative * std
    assert abs(logits.std().item() - std) <= relative * std
    assert int(logits.argmax()) == record["argmax"]


def _draw(key: str, shape: list[int], gain: float) -> Tensor:
    if key.endswith("num_batches_tracked"):
        return torch.tensor(0)
    generator = torch.Generator().manual_seed(crc32(key.encode()))
    if len(shape) >= 2:
        fan_in = prod(shape[1:])
        return torch.randn(shape, generator=generator, dtype=torch.float64) * (gain / fan_in**0.5)
    if key.endswith(("running_mean", "bias")):
        return torch.randn(shape, generator=generator, dtype=torch.float64) * 0.1
    return torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
