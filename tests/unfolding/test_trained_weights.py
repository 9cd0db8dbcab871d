"""Trained weights and photos: a network that was unfolded gives the answers that it gave."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from refold.unfolding import unfold

_SPEC = importlib.util.spec_from_file_location(
    "folding_of_real_weights", Path(__file__).resolve().parents[1] / "folding" / "test_real_weights.py"
)
assert _SPEC is not None
assert _SPEC.loader is not None
_REAL = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_REAL)
photos, trained = _REAL.photos, _REAL.trained

pytestmark = pytest.mark.slow


def test_868_answers_are_right_before_any_training(trained: nn.Module, photos: Tensor) -> None:
    wide = unfold(trained, "ghostnetv3", example_input=photos[:1])
    assert len(wide.unfold_report.layers) == 48
    found = _REAL.answers(wide, photos)
    assert int((found == torch.arange(1000)).sum()) == _REAL.RIGHT
