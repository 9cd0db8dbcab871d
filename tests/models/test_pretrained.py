"""Published weights: fetched from a hub and from URLs, held to their checksums, and refused in one sentence."""

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save
from torch import Tensor, nn

from golden import drawn_weights
from refold.errors import CheckpointError
from refold.models import create_model, default_cfgs, list_models
from refold.models.pretrained import RELEASES

NAME = "repghostnet_050"
HUB = "timm/repghostnet_050.in1k"


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Weights in the official layout, that of the hub."""
    return {key: value.float() for key, value in drawn_weights(timm.create_model(NAME)).items()}


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches for every test, and no way to the hub."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def refusal(**arguments: object) -> str:
    with pytest.raises(CheckpointError) as raised:
        create_model(NAME, pretrained=True, **arguments)
    message = str(raised.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


def at_url(path: Path) -> dict[str, object]:
    """The configuration of a network whose weights are behind a URL alone."""
    return {"hf_hub_id": None, "url": path.as_uri()}


def holds(network: nn.Module, weights: dict[str, Tensor]) -> bool:
    """Whether a network computes what timm's does with these weights."""
    theirs = timm.create_model(NAME).eval()
    theirs.load_state_dict(weights)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        return torch.allclose(network.eval()(x), theirs(x), rtol=1e-4, atol=1e-5)


def written(weights: dict[str, Tensor], folder: Path, name: str) -> Path:
    torch.save({"state_dict": weights, "epoch": 3}, folder / "weights")
    digest = hashlib.sha256((folder / "weights").read_bytes()).hexdigest()
    return (folder / "weights").rename(folder / name.format(digest[:8]))


@pytest.mark.parametrize("name", ["weights-{}.pth.tar", "weights-{}.pth", "weights.pth"])
def test_a_url_is_fetched_and_held_to_the_checksum_in_its_name(
    name: str, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path = written(weights, tmp_path, name)
    network = create_model(NAME, pretrained=True, pretrained_cfg_overlay=at_url(path))
    assert holds(network, weights)
    cached = list((tmp_path / "torch").rglob("weights*"))
    assert [file.name for file in cached] == [path.name]
    assert network.pretrained_cfg["url"] == path.as_uri()
    assert "state_dict" not in network.pretrained_cfg
    assert "pretrained" not in network.architecture["arguments"]


def test_a_wrong_checksum_is_refused_and_nothing_stays(weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = written(weights, tmp_path, "weights-{}.pth")
    path.write_bytes(path.read_bytes() + b"\0")
    message = refusal(pretrained_cfg_overlay=at_url(path))
    assert message.startswith(
        f"The file fetched from {path.as_uri()} is not the published one for {NAME} (invalid"
    )
    assert not list((tmp_path / "torch").rglob("weights*"))


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.pth").write_text("<html>404</html>")
    assert "cannot be read" in refusal(pretrained_cfg_overlay=at_url(tmp_path / "page.pth"))
    message = refusal(pretrained_cfg_overlay=at_url(tmp_path / "missing.pth"))
    assert message.startswith(f"There is no network to fetch the pretrained weights of {NAME} from file:")


def test_no_network_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    asked = []

    def unreachable(url: str, *_: object, **__: object) -> None:
        asked.append(url)
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr("timm.models._hub.download_url_to_file", unreachable)
    message = refusal()
    assert message.startswith(
        f"There is no network to fetch the pretrained weights of {NAME} from {HUB} or {RELEASES[NAME]} ("
    )
    assert message.endswith("without pretrained=True and use load_checkpoint on a file.")
    assert asked == [RELEASES[NAME]]


def in_hub_cache(folder: Path, content: bytes, digest: str) -> None:
    """The file as the hub's client keeps it: named by its SHA-256, and a link in the snapshot."""
    repository = folder / "hub" / f"models--{HUB.replace('/', '--')}"
    for part in ("blobs", "refs", "snapshots/c0ffee"):
        (repository / part).mkdir(parents=True)
    (repository / "refs/main").write_text("c0ffee")
    (repository / "blobs" / digest).write_bytes(content)
    (repository / "snapshots/c0ffee/model.safetensors").symlink_to(repository / "blobs" / digest)


def test_a_file_of_the_hub_is_held_to_its_sha256(weights: dict[str, Tensor], tmp_path: Path) -> None:
    content = save(weights)
    digest = hashlib.sha256(content).hexdigest()
    in_hub_cache(tmp_path, content, digest)
    assert holds(create_model(NAME, pretrained=True, cache_dir=tmp_path / "hub"), weights)
    (blob,) = (tmp_path / "hub").rglob(f"blobs/{digest}")
    blob.write_bytes(content[:-1] + b"\1")
    message = refusal(cache_dir=tmp_path / "hub")
    assert f"in {blob} are not the published ones: their SHA-256 is " in message
    assert f"not {digest[:8]}…; delete that file" in message


@pytest.fixture
def hub(weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub on this machine that has one file; gives the requests that it got."""
    content = save(weights)
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            requests.append(f"{self.command} {self.path}")
            known = self.path == f"/{HUB}/resolve/main/model.safetensors"
            self.send_response(200 if known else 404)
            if known:
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", "c0ffee")
            else:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", str(len(content) if known else 0))
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    for module in (huggingface_hub.constants, huggingface_hub.file_download.constants):
        monkeypatch.setattr(module, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield requests
    server.shutdown()
    server.server_close()


def test_the_hub_is_asked_once_and_its_file_kept(
    hub: list[str], weights: dict[str, Tensor], tmp_path: Path
) -> None:
    for _ in range(2):
        assert holds(create_model(NAME, pretrained=True, cache_dir=tmp_path / "hub"), weights)
    assert sum(request.startswith("GET") for request in hub) == 1


def test_a_release_serves_where_the_hub_cannot(
    weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(weights, tmp_path, "weights.pth.tar")
    network = create_model(NAME, pretrained=True, pretrained_cfg_overlay={"url": path.as_uri()})
    assert holds(network, weights)


def test_weights_that_the_arguments_have_no_place_for(weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = written(weights, tmp_path, "weights.pth")
    message = refusal(pretrained_cfg_overlay=at_url(path), reparameterization="none")
    assert f"weights of {NAME} do not fit the layers that these arguments build" in message


def test_every_release_belongs_to_a_network_and_names_its_width() -> None:
    assert set(RELEASES) <= set(list_models())
    assert all(default_cfgs[name].url == url for name, url in RELEASES.items())
    assert len(set(RELEASES.values())) == len(RELEASES)
