"""A batch norm that the next layer takes up, across pooling and reshaping, and what stands in its way."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from checking import LARGEST, Net, call, distance, images, trained
from torch import Tensor, nn

import refold

SIZES = ((6, 5), (7, 8))


def net(forward: Callable[[Any, Tensor], Any], **layers: nn.Module) -> nn.Module:
    """A batch norm behind an activation, so that no convolution before it can take it up, and a layer that reads it."""
    defaults = {"norm": nn.BatchNorm2d(4), "head": nn.Linear(4, 3)}
    return trained(Net(forward, **defaults | layers)).double()


def check(model: nn.Module, batch_norms: int = 0, sizes: Any = SIZES) -> Any:
    first, *others = images(4, sizes)
    plain: Any = refold.fold(model, first)
    assert plain.fold_report.after.batch_norms == batch_norms
    for x in (first, *others):
        assert distance(call(model, x), call(plain, x)) <= LARGEST
    return plain


PASSAGES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "mean": lambda self, x: self.head(self.norm(x.relu()).mean((2, 3))),
    "mean that keeps the axes": lambda self, x: self.head(
        self.norm(x.relu()).mean((2, 3), keepdim=True).flatten(1)
    ),
    "pooling": lambda self, x: self.head(torch.flatten(F.adaptive_avg_pool2d(self.norm(x.relu()), 1), 1)),
    "tokens": lambda self, x: self.head(self.norm(x.relu()).flatten(2).transpose(1, 2)),
    "channels last": lambda self, x: self.head(self.norm(x.relu()).permute(0, 2, 3, 1)),
    "a mean over tokens": lambda self, x: self.head(self.norm(x.relu()).flatten(2).transpose(1, 2).mean(1)),
    "sizes": lambda self, x: sized(self, self.norm(x.relu())),
    "dropout": lambda self, x: self.head(F.dropout(self.norm(x.relu()), 0.5, self.training).mean((2, 3))),
}


def sized(self: Any, y: Tensor) -> Tensor:
    batch, channels, height, width = y.shape
    return self.head(y.reshape(batch, channels, height * width).transpose(1, 2))


@pytest.mark.parametrize("passage", PASSAGES)
def test_the_layer_behind_takes_up_the_norm(passage: str) -> None:
    plain = check(net(PASSAGES[passage]))
    assert isinstance(plain.norm, nn.Identity) or not hasattr(plain, "norm")
    assert type(plain.head) is nn.Linear
    assert plain.fold_report.proof.worst_region <= 1e-13


def test_a_convolution_reads_a_pooled_map() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(self.pool(self.norm(x.relu())))

    check(net(forward, pool=nn.AdaptiveAvgPool2d((2, 3)), head=nn.Conv2d(4, 6, 2, bias=False)))
    check(net(forward, pool=nn.AdaptiveAvgPool2d(1), head=nn.Conv2d(4, 6, 1, groups=2)))
    # The zeros around the map are no shifted channels.
    check(net(forward, pool=nn.AdaptiveAvgPool2d((2, 3)), head=nn.Conv2d(4, 6, 3, padding=1)), batch_norms=1)


def mixed(self: Any, x: Tensor) -> Tensor:
    return self.head(self.norm(x.relu()).mean(1))


def all_of_it(self: Any, x: Tensor) -> Tensor:
    return self.head(self.norm(x.relu()).flatten(1))


def other_order(self: Any, x: Tensor) -> Tensor:
    return self.head(self.norm(x.relu()).mean((2, 3)).reshape(-1, 2, 2).transpose(1, 2).flatten(1))


def read_twice(self: Any, x: Tensor) -> Any:
    y = self.norm(x.relu())
    return self.head(y.mean((2, 3))), y.amax()


def two_layers(self: Any, x: Tensor) -> Tensor:
    y = self.norm(x.relu()).mean((2, 3))
    return self.head(y) + self.head(2 * y)


def largest(self: Any, x: Tensor) -> Tensor:
    return self.head(self.norm(x.relu()).amax((2, 3)))


@pytest.mark.parametrize("forward", [mixed, all_of_it, other_order, read_twice, two_layers, largest])
def test_it_stays_where_channels_mix_or_others_read_it(forward: Callable[[Any, Tensor], Any]) -> None:
    widths = {mixed: 5, all_of_it: 4 * 6 * 5}
    model = net(forward, head=nn.Linear(widths.get(forward, 4), 3))
    plain = check(model, batch_norms=1, sizes=SIZES[:1])
    assert dict(plain.fold_report.left)["norm"]


def test_a_layer_that_somebody_else_calls_too() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(self.norm(x.relu()).mean((2, 3))) + self.head(x.mean((2, 3)))

    check(net(forward), batch_norms=1)


def test_functions_with_their_own_weights() -> None:
    class Functions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.weight = nn.BatchNorm2d(4), nn.Parameter(torch.randn(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.norm(x.relu()).mean((2, 3)), self.weight)

    check(trained(Functions()).double())


def test_every_layer_that_reads_it_takes_it_up() -> None:
    """As in attention: one norm before queries, keys and values, the keys from a smaller map."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.norm(x.relu())
        batch, _, height, width = y.shape
        queries = self.queries(y).reshape(batch, 6, height * width)
        keys = self.keys(F.adaptive_avg_pool2d(y, (2, 2)).flatten(2).transpose(1, 2))
        return (
            queries.transpose(1, 2).softmax(1) * keys.sum((1, 2), keepdim=True)
            + x.mean() * self.values(y).sum()
        )

    layers = {
        "queries": nn.Conv2d(4, 6, 1),
        "keys": nn.Linear(4, 6),
        "values": nn.Conv2d(4, 2, 1, bias=False),
    }
    plain = check(net(forward, head=nn.Identity(), **layers))
    assert [region.layer for region in plain.fold_report.regions] == [
        "absorbed into the 3 layers that read it"
    ]


def test_one_reader_that_cannot_holds_back_the_others() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        y = self.norm(x.relu())
        return self.head(y.mean((2, 3))), self.padded(y)

    check(net(forward, padded=nn.Conv2d(4, 2, 3, padding=1)), batch_norms=1)


@pytest.mark.parametrize("name", ["starnet_s1", "fastvit_sa12"])
def test_networks_of_timm(name: str) -> None:
    model = trained(timm.create_model(name, num_classes=10))
    plain: Any = refold.fold(model, torch.randn(1, 3, 64, 64))
    assert plain.fold_report.after.batch_norms == 0
    assert plain.fold_report.left == []
    assert plain.get_classifier().weight.shape == model.get_classifier().weight.shape
