"""Settings and fixtures for every test."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from refold import cli

# Several test processes share the cores: more threads would wait for each other.
torch.set_num_threads(1)


def pytest_runtest_setup() -> None:
    """Every test draws the same numbers whenever and beside whatever it runs."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def randomised() -> Callable[[nn.Module], nn.Module]:
    """Give the batch norms of a model statistics as if it had been trained, and put it in eval mode."""

    def randomise(model: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(0)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor, shift in (
                    (module.running_mean, -0.5),
                    (module.running_var, 0.5),
                    (module.weight, 0.5),
                    (module.bias, -0.5),
                ):
                    assert tensor is not None
                    tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + shift)
        return model.eval()

    return randomise


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Run the command in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["refold", *map(str, arguments)])
        # Rich looks up the stream when it is made, capsys replaces it for every test.
        monkeypatch.setattr(cli.console, "width", 100)
        with pytest.raises(SystemExit) as left:
            cli.main()
        captured = capsys.readouterr()
        return int(left.value.code or 0), captured.out, captured.err

    return run
