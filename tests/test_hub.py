"""Publishing and fetching, against a hub that is a folder."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import refold
from refold import cli
from refold.errors import CheckpointError, InputError
from refold.models import pretrained


class Hub:
    """Repositories in a folder, with the calls of the library that publishing and fetching make."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def create_repo(self, repository: str, *, private: bool, exist_ok: bool) -> str:
        if repository.startswith("forbidden/"):
            raise PermissionError("403 Forbidden")
        (self.root / repository).mkdir(parents=True, exist_ok=exist_ok)
        return f"hub/{repository}{' (private)' if private else ''}"

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)

    def cached(self, repository: str, name: str, **_: Any) -> str | None:
        path = self.root / repository / name
        return str(path) if path.is_file() else None


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    monkeypatch.setattr(pretrained.huggingface_hub, "try_to_load_from_cache", made.cached)

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(pretrained.huggingface_hub, "get_hf_file_metadata", unreachable)
    return made


@pytest.fixture
def plain(randomised: Callable[[nn.Module], nn.Module], tmp_path: Path) -> nn.Module:
    net = randomised(refold.create_model("resnet10t", num_classes=3))
    folded = refold.fold(net, torch.randn(1, 3, 64, 64))
    refold.save(folded, tmp_path / "plain.safetensors", class_names=["a", "b", "c"])
    return folded


@pytest.mark.usefixtures("plain")
def test_what_is_published_is_fetched(hub: Hub, plain: nn.Module, tmp_path: Path) -> None:
    assert refold.push(tmp_path / "plain.safetensors", "me/net") == "hub/me/net"
    card = (hub.root / "me" / "net" / "README.md").read_text()
    assert "library_name: refold" in card
    assert 'refold.load("hf-hub:me/net")' in card
    assert "Classes: a, b, c." in card
    image = torch.randn(2, 3, 64, 64)
    for name in ("hf-hub:me/net", "hf_hub:me/net@main"):
        with torch.no_grad():
            assert torch.equal(refold.load(name)(image), plain(image))


@pytest.mark.usefixtures("plain", "hub")
def test_commands_take_it_from_there(tmp_path: Path) -> None:
    refold.push(tmp_path / "plain.safetensors", "me/net")
    result = CliRunner().invoke(cli.app, ["profile", "hf-hub:me/net", "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    assert "batch norm" not in result.stdout
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    result = CliRunner().invoke(
        cli.app, ["predict", "hf-hub:me/net", str(tmp_path / "a.png")], catch_exceptions=False
    )
    assert re.match(r".*a\.png: [abc] \d", result.stdout)


@pytest.mark.usefixtures("plain")
def test_the_model_card_of_a_run_goes_along(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# My run\n")
    result = CliRunner().invoke(
        cli.app, ["push", str(tmp_path), "me/net", "--private"], catch_exceptions=False
    )
    assert (result.exit_code, result.stdout) == (0, "hub/me/net (private)\n")
    assert (hub.root / "me" / "net" / "README.md").read_text() == "# My run\n"


@pytest.mark.usefixtures("plain", "hub")
def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    file = tmp_path / "plain.safetensors"
    with pytest.raises(InputError, match="The repository is 'net'; give owner/name"):
        refold.push(file, "net")
    with pytest.raises(InputError, match=r"'forbidden/net' cannot be published \(403 Forbidden\); log in"):
        refold.push(file, "forbidden/net")
    torch.save({}, tmp_path / "foreign.pth")
    with pytest.raises(CheckpointError, match=r"was not written by refold\.save"):
        refold.push(tmp_path / "foreign.pth", "me/net")
    with pytest.raises(CheckpointError, match=r"There is no network to fetch .* of hf-hub:me/other"):
        refold.load("hf-hub:me/other")
