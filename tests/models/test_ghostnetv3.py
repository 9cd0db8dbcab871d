"""The branches of GhostNetV3 as arguments: the rows of the paper's tables 2 and 5."""

import pytest
import torch

from golden import drawn_weights
from refold.blocks import BranchSum
from refold.errors import InputError
from refold.folding import fold
from refold.models import create_model
from refold.recording.cost import count


def test_one_branch_alone_is_ghostnetv2() -> None:
    v2 = create_model("ghostnetv2_050", num_classes=3).double().eval()
    v3 = (
        create_model("ghostnetv3_050", num_classes=3, branches=1, pointwise=False, identity=False)
        .double()
        .eval()
    )
    v2.load_state_dict(drawn_weights(v2))
    renamed = {key.replace(".conv.branches.0.", "."): key for key in v3.state_dict()}
    v3.load_state_dict({renamed[key]: value for key, value in v2.state_dict().items()})
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(v3(x), v2(x))


@pytest.mark.parametrize("branches", range(1, 6))
@pytest.mark.parametrize("pointwise", [True, False])
@pytest.mark.parametrize("identity", [True, False])
def test_branches_are_those_asked_for(branches: int, pointwise: bool, identity: bool) -> None:
    with torch.device("meta"):
        network = create_model("ghostnetv3_100", branches=branches, pointwise=pointwise, identity=identity)
    sums = [module for module in network.modules() if isinstance(module, BranchSum)]
    # Two convolutions in each of the 32 modules, and the strided one of four blocks.
    assert len(sums) == 2 * 32 + 4
    for part in sums:
        kernel, *_ = kernels = [branch.conv.kernel_size[0] for branch in part.branches]
        assert kernels == [kernel] * branches + [1] * (pointwise and kernel > 1)
        cheap = part.branches[0].conv.groups > 1 and part.branches[0].conv.stride == (1, 1)
        assert (part.skip is not None) == (identity and cheap)


@pytest.mark.parametrize(
    ("branches", "pointwise", "identity"), [(1, True, True), (2, False, True), (4, True, False)]
)
def test_every_row_folds_to_the_same_plain_network(branches: int, pointwise: bool, identity: bool) -> None:
    network = create_model("ghostnetv3_050", branches=branches, pointwise=pointwise, identity=identity)
    x = torch.randn(1, 3, 32, 32)
    plain = count(fold(network, x, prove=False), x)
    reference = count(fold(create_model("ghostnetv2_050"), x, prove=False), x)
    assert plain == reference


def test_no_branch_is_refused() -> None:
    with pytest.raises(InputError, match="branches is 0; give the number of repeated convolutions"):
        create_model("ghostnetv3_050", branches=0)
