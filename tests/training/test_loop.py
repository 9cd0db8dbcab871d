"""The loop learns what can be learnt, repeats itself from a seed, and stops with a reason."""

from collections.abc import Callable

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from refold.errors import InputError
from refold.training.data import Images, TransformedImages
from refold.training.loop import Epoch, Recipe, batches_per_epoch, predict, train


def to_tensor(image: Image.Image) -> Tensor:
    return torch.tensor(image.getpixel((0, 0))).float().div(255).expand(4, 4, 3).permute(2, 0, 1)


@pytest.fixture
def colours() -> TransformedImages:
    """Red, green and blue images."""
    shades = [tuple((200 + i) * (c == channel) for c in range(3)) for i in range(20) for channel in range(3)]
    sources = [Image.new("RGB", (4, 4), shade) for shade in shades]
    return TransformedImages(Images(sources, [index % 3 for index in range(60)]), to_tensor)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))


def test_it_learns_and_repeats_itself(colours: TransformedImages) -> None:
    weights = []
    for seed in (3, 3, 4):
        net, batches, epochs = network(), [0], list[Epoch]()

        def on_batch(batches: list[int] = batches) -> None:
            batches[0] += 1

        history = train(
            net, colours, colours, Recipe(5, 16, 1e-2), seed=seed, on_batch=on_batch, on_epoch=epochs.append
        )
        assert history == epochs
        assert [epoch.number for epoch in history] == [1, 2, 3, 4, 5]
        assert batches == [5 * batches_per_epoch(60, 16)] == [15]
        assert history[-1].loss < history[0].loss
        assert history[-1].accuracy == 1
        assert not net.training
        weights.append(net[4].weight)  # type: ignore[index]
        assert net[0].weight.is_contiguous()  # type: ignore[index]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_fewer_images_than_a_batch(colours: TransformedImages) -> None:
    few = TransformedImages(Images(colours.images.sources[:5], colours.images.targets[:5]), to_tensor)
    batches: list[int] = []
    train(network(), few, colours, Recipe(2, 64), on_batch=lambda: batches.append(1))
    assert len(batches) == 2


def test_predict_takes_any_function(colours: TransformedImages) -> None:
    brightest: Callable[[Tensor], Tensor] = lambda x: x.mean((2, 3))  # noqa: E731
    predictions, truth = predict(brightest, colours, batch_size=7)
    assert truth.tolist() == [index % 3 for index in range(60)]
    assert torch.equal(predictions, truth)
    net = network().train()
    predictions, _ = predict(net, colours)
    assert not net.training
    expected = net(torch.stack([x for x, _ in (colours[i] for i in range(60))])).argmax(1)
    assert torch.equal(predictions, expected)


def test_settings_and_losses_that_make_no_sense(colours: TransformedImages) -> None:
    with pytest.raises(InputError, match="give at least 1 epoch"):
        train(network(), colours, colours, Recipe(0))
    with pytest.raises(InputError, match="batches of at least 2"):
        train(network(), colours, colours, Recipe(1, 1))
    with pytest.raises(InputError, match="no longer a number in epoch 1; lower the learning rate"):
        train(network(), colours, colours, Recipe(1, 16, float("inf"), warm_up_epochs=0))
