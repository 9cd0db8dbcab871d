"""Batch norms in every state, models in training mode, and other dtypes than float32."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checking import (
    LARGEST,
    Deciding,
    Net,
    Parallel,
    call,
    check_fold,
    conv_bn,
    distance,
    images,
    normal,
    trained,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import refold


def test_three_kinds_of_images() -> None:
    """BatchNorm1d, 2d and 3d behind convolutions of as many axes."""
    for axes, conv, norm in (
        (1, nn.Conv1d, nn.BatchNorm1d),
        (2, nn.Conv2d, nn.BatchNorm2d),
        (3, nn.Conv3d, nn.BatchNorm3d),
    ):
        sizes = [(8, 7, 6)[:axes], (5, 9, 4)[:axes]]
        branches = [nn.Sequential(conv(4, 6, k, padding=k // 2, bias=False), norm(6)) for k in (3, 1)]
        plain = check_fold(Parallel(*branches), images(4, sizes), convolutions=1)
        assert type(plain.conv) is conv


def test_a_synchronised_batch_norm() -> None:
    """What distributed training leaves in a checkpoint's model."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(Parallel(conv_bn(4, 4, 3), conv_bn(4, 4, 1)))
    assert any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    check_fold(model, images(4), convolutions=1)


@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_with_and_without_affine_parameters(affine: bool) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=affine), nn.ReLU())
    check_fold(model, images(4), convolutions=1)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(st.floats(1e-8, 10.0), min_size=2, max_size=4), st.floats(1e-10, 1e-6))
def test_each_norm_has_an_epsilon_of_its_own(epsilons: list[float], variance: float) -> None:
    """Variances far below epsilon, so that a wrong epsilon would be seen."""
    branches = [conv_bn(4, 4, 3) for _ in epsilons]
    for branch, epsilon in zip(branches, epsilons, strict=True):
        branch[1].eps = epsilon
    model = trained(Parallel(*branches).double())
    for branch in branches:
        branch[1].running_var.fill_(variance)
    (x, *_) = images(4)
    plain = refold.fold(model, x)
    assert plain.fold_report.after.batch_norms == 0
    assert distance(call(model, x), call(plain, x)) <= LARGEST


def test_a_norm_without_running_statistics_is_left() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, track_running_stats=False), nn.ReLU())
    check_fold(model, images(4), convolutions=1, left=["no running statistics"])


def test_instance_and_layer_norms_are_left_alone() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3),
        nn.InstanceNorm2d(6),
        nn.Conv2d(6, 6, 1),
        nn.GroupNorm(2, 6),
        *conv_bn(6, 6, 1),
        nn.ReLU(),
    )
    check_fold(model, images(4), convolutions=3)


def test_a_norm_that_always_uses_the_batch_is_left() -> None:
    """A norm called in training mode from code that is in evaluation mode."""

    def forward(net: Net, x: Tensor) -> Tensor:
        bn = net.bn
        y = F.batch_norm(
            net.conv(x), bn.running_mean.clone(), bn.running_var.clone(), bn.weight, bn.bias, training=True
        )
        return y.relu()

    model = Net(forward, conv=nn.Conv2d(4, 4, 3), bn=nn.BatchNorm2d(4))
    check_fold(model, images(4), convolutions=1, batch_norms=None, left=["training mode"])


def test_two_norms_in_a_row_behind_a_convolution() -> None:
    model = nn.Sequential(
        *conv_bn(4, 4), nn.BatchNorm2d(4), nn.Identity(), nn.BatchNorm2d(4, affine=False), nn.ReLU()
    )
    check_fold(model, images(4), convolutions=1)


def test_dropout_between_convolution_and_norm() -> None:
    for dropout in (nn.Dropout(), nn.Dropout2d(0.3), nn.AlphaDropout(), nn.Identity()):
        model = nn.Sequential(nn.Conv2d(4, 4, 3), dropout, nn.BatchNorm2d(4), nn.ReLU())
        check_fold(model, images(4), convolutions=1)
    functional = Net(
        lambda net, x: net.bn(F.dropout(net.conv(x), 0.5, training=net.training)).relu(),
        conv=nn.Conv2d(4, 4, 3),
        bn=nn.BatchNorm2d(4),
    )
    check_fold(functional, images(4), convolutions=1)


def test_a_dropout_that_always_drops_is_not_removed() -> None:
    """Monte-Carlo dropout in evaluation mode is no identity."""
    model = Net(lambda net, x: net.bn(F.dropout(net.conv(x), 0.0, training=True)).relu())
    model.conv, model.bn = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    check_fold(model, images(4), batch_norms=1, left=["dropout"])


def test_an_identity_branch_that_is_a_norm() -> None:
    """RepVGG's third branch; the shortcut alone and the norm alone, too."""
    check_fold(Parallel(conv_bn(4, 4, 3), nn.BatchNorm2d(4)), images(4), convolutions=1)
    check_fold(Parallel(conv_bn(4, 4, 3), nn.Identity()), images(4), convolutions=1)
    grouped = Parallel(conv_bn(4, 4, 3, groups=2), nn.BatchNorm2d(4))
    assert check_fold(grouped, images(4), convolutions=1).conv.groups == 2


def test_norms_alone_do_not_become_a_convolution() -> None:
    """A sum of two norms costs no products; a convolution would."""
    check_fold(
        Parallel(nn.BatchNorm2d(4), nn.BatchNorm2d(4)),
        images(4),
        convolutions=0,
        batch_norms=2,
        left=["not next to a convolution"],
    )


def test_a_batch_norm_alone() -> None:
    """Nothing to fold: the norm is named with a reason, be it the model itself or in code that decides by values."""
    for model in (
        nn.BatchNorm2d(4),
        Deciding(nn.BatchNorm2d(4)),
        nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)),
    ):
        plain = refold.fold(trained(model.double()), images(4)[0])
        assert plain.fold_report.after.batch_norms == 1
        assert plain.fold_report.left
        assert all(name and reason for name, reason in plain.fold_report.left)
        assert not [reason for _, reason in plain.fold_report.left if "does not run" in reason]


def test_a_norm_that_never_runs_is_named() -> None:
    model = Net(lambda net, x: net.body(x).relu(), body=conv_bn(4, 4), auxiliary=conv_bn(4, 4))
    plain = check_fold(model, images(4), convolutions=1, left=["does not run on the example input"])
    assert [name for name, _ in plain.fold_report.left] == ["auxiliary.1"]
    assert isinstance(plain.auxiliary[1], nn.BatchNorm2d)


def test_a_model_in_training_mode_folds_its_evaluation_function_and_says_so() -> None:
    """USERS: folded in train mode, other outputs. The result is in evaluation mode, the argument stays as it was."""
    model = trained(
        Parallel(conv_bn(4, 4, 3), nn.Sequential(nn.Dropout(), *conv_bn(4, 4, 1))).double()
    ).train()
    model.branches[1][1].eval()
    flags = [module.training for module in model.modules()]
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    (x, *_) = images(4)
    plain = refold.fold(model, x)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in model.named_buffers())
    assert not any(module.training for module in plain.modules())
    assert any("training mode" in note for note in plain.fold_report.notes)
    assert distance(call(model.eval(), x), call(plain, x)) <= LARGEST
    assert not refold.fold(model.eval(), x).fold_report.notes


def test_one_norm_left_in_training_mode_is_said_too() -> None:
    model = trained(nn.Sequential(*conv_bn(4, 4), nn.ReLU()).double())
    model[1].train()
    (x, *_) = images(4)
    plain = refold.fold(model, x)
    assert any("training mode" in note for note in plain.fold_report.notes)
    assert model[1].training
    assert distance(call(model.eval(), x), call(plain, x)) <= LARGEST


DTYPES = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 2e-6, torch.float64: 1e-13}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dtype_is_kept(dtype: torch.dtype) -> None:
    """USERS: folding breaks half precision, fused convolutions are created in float32."""
    model = nn.Sequential(
        Parallel(conv_bn(4, 8, 3), conv_bn(4, 8, 1)),
        nn.Conv2d(8, 4, 1),
        nn.Flatten(),
        nn.LazyLinear(3),
        nn.BatchNorm1d(3),
    )
    x = normal(2, 4, 8, 8, dtype=torch.float64).to(dtype)
    with torch.no_grad():
        model(x.float())
    model = trained(model).to(dtype)
    plain: Any = refold.fold(model, x)
    assert {parameter.dtype for parameter in plain.parameters()} == {dtype}
    assert call(plain, x).dtype == dtype
    assert plain.fold_report.after.batch_norms == 0
    truth = call(model.double(), x.double())
    assert distance(truth, call(plain, x).double()) <= DTYPES[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_folded_in_float64_and_rounded_once(dtype: torch.dtype) -> None:
    """Bit for bit what float64 arithmetic and one rounding give: rounding twice would differ in some weight."""
    model = trained(conv_bn(16, 16)).to(dtype)
    plain: Any = refold.fold(model, normal(1, 16, 5, 5).to(dtype))
    conv, bn = model[0].double(), model[1].double()
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    once = (conv.weight * scale.reshape(-1, 1, 1, 1)).to(dtype)
    assert (plain[0].weight != once).float().mean() <= 1e-3  # where two orders of multiplication round apart
    assert torch.equal(plain[0].bias, (bn.bias - bn.running_mean * scale).to(dtype))


def test_weights_that_do_not_fit_float16_are_left() -> None:
    """A norm with a tiny variance: its scale times the weight is beyond 65504."""
    model = trained(nn.Sequential(*conv_bn(4, 4, 1), nn.Sigmoid(), *conv_bn(4, 4, 1)))
    model[0].weight.data.fill_(50.0)
    model[1].running_var.fill_(1e-7)
    model[1].weight.data.fill_(1e4)
    model[1].bias.data.zero_()
    model[1].running_mean.zero_()
    model[1].eps = 1e-7
    x = normal(1, 4, 6, 6, dtype=torch.float64).half() * 1e-6
    plain: Any = refold.fold(model.half(), x)
    assert plain.fold_report.left == [("1", "the folded weight does not fit float16")]
    assert plain.fold_report.after.batch_norms == 1
    assert distance(call(model, x).double(), call(plain, x).double()) <= 4e-3


def test_weights_that_vanish_in_float16_are_left() -> None:
    """A norm with a huge variance scales large values down; scaled weights would lose most of their bits."""
    model = trained(conv_bn(8, 4, 1))
    model[0].weight.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(0))
    model[1].running_var.fill_(6e4)
    model[1].weight.data.fill_(1e-3)
    model[1].running_mean.zero_()
    model[1].bias.data.zero_()
    x = normal(1, 8, 6, 6, dtype=torch.float64).half() * 3000
    model = nn.Sequential(*model.half(), nn.Hardtanh(), *conv_bn(4, 4, 1).half()).eval()
    plain: Any = refold.fold(model, x)
    assert dict(plain.fold_report.left) == {"1": "the folded weight does not fit float16"}
    assert plain.fold_report.after.batch_norms == 1


def test_layers_of_different_dtypes_in_one_model() -> None:
    """A float32 head behind a float16 body, as mixed-precision models are served."""

    def forward(net: Net, x: Tensor) -> Tensor:
        return net.head(net.body(x.half()).float()).relu()

    model = trained(
        Net(forward, body=Parallel(conv_bn(4, 4), conv_bn(4, 4, 1)).half(), head=conv_bn(4, 4, 1))
    )
    plain: Any = refold.fold(model, normal(1, 4, 8, 8).float())
    assert plain.fold_report.after.batch_norms == 0
    assert {p.dtype for p in plain.body.parameters()} == {torch.float16}
    assert {p.dtype for p in plain.head.parameters()} == {torch.float32}
