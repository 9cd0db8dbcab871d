"""Where published weights come from: the hub that timm uses, then the releases of the official repositories."""

import hashlib
import re
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

import huggingface_hub
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled, RemoteEntryNotFoundError
from timm.models._hub import download_cached_file
from torch import Tensor

from refold.errors import CheckpointError, first_line
from refold.models.loading import read_weights

_GHOST = "https://github.com/huawei-noah/Efficient-AI-Backbones/releases/download"
_REPGHOST = "https://github.com/ChengpengChen/RepGhost/releases/download/RepGhost"

# No checksum is published for any of these files.
RELEASES = {
    "ghostnet_100": "https://github.com/huawei-noah/CV-backbones/releases/download/ghostnet_pth/ghostnet_1x.pth",
    "ghostnetv2_100": f"{_GHOST}/GhostNetV2/ck_ghostnetv2_10.pth.tar",
    "ghostnetv2_130": f"{_GHOST}/GhostNetV2/ck_ghostnetv2_13.pth.tar",
    "ghostnetv2_160": f"{_GHOST}/GhostNetV2/ck_ghostnetv2_16.pth.tar",
    "ghostnetv3_100": f"{_GHOST}/GhostNetV3/ghostnetv3-1.0.pth.tar",
    "gghost_regnetx_032": f"{_GHOST}/g_ghost_regnet/g_ghost_regnet_3.2g_77.8.pth",
    "gghost_regnetx_040": f"{_GHOST}/g_ghost_regnet/g_ghost_regnet_4.0g_78.6.pth",
    "gghost_regnetx_080": f"{_GHOST}/g_ghost_regnet/g_ghost_regnet_8.0g_79.0.pth",
    "gghost_regnetx_160": f"{_GHOST}/g_ghost_regnet/g_ghost_regnet_16.0g_79.9.pth",
    "repghostnet_050": f"{_REPGHOST}/repghostnet_0_5x_43M_66.95.pth.tar",
    "repghostnet_058": f"{_REPGHOST}/repghostnet_0_58x_60M_68.94.pth.tar",
    "repghostnet_080": f"{_REPGHOST}/repghostnet_0_8x_96M_72.24.pth.tar",
    "repghostnet_100": f"{_REPGHOST}/repghostnet_1_0x_142M_74.22.pth.tar",
    "repghostnet_111": f"{_REPGHOST}/repghostnet_1_11x_170M_75.07.pth.tar",
    "repghostnet_130": f"{_REPGHOST}/repghostnet_1_3x_231M_76.37.pth.tar",
    "repghostnet_150": f"{_REPGHOST}/repghostnet_1_5x_301M_77.45.pth.tar",
    "repghostnet_200": f"{_REPGHOST}/repghostnet_2_0x_516M_78.81.pth.tar",
}

_UNREACHABLE = (
    URLError,
    socket.gaierror,
    ConnectionError,
    TimeoutError,
    OfflineModeIsEnabled,
    LocalEntryNotFoundError,
)

_FILES = ("model.safetensors", "pytorch_model.bin")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BLOCK = 1 << 20


def published_weights(
    name: str, cfg: Mapping[str, Any], cache_dir: str | Path | None = None
) -> dict[str, Tensor]:
    """The published weights of a network, from the first of its sources that can be reached.

    ``cfg`` holds timm's ``hf_hub_id`` and ``url``. What a source publishes a checksum of is held to it: a file of the
    hub to its SHA-256, one behind a URL to the start of a SHA-256 that its name ends with.
    Raises ``CheckpointError`` without a network, where a checksum is another, and where the file cannot be read.
    """
    sources: dict[str, Callable[[str, str | Path | None], Path]] = {}
    if cfg.get("hf_hub_id"):
        sources[cfg["hf_hub_id"]] = hub_file
    if cfg.get("url"):
        sources[cfg["url"]] = _released_file
    failure: Exception | None = None
    for source, fetch in sources.items():
        try:
            path = fetch(source, cache_dir)
        except CheckpointError:
            raise
        except Exception as error:  # whatever a network and two libraries can raise
            failure = failure or error
            continue
        return read_weights(path)
    assert failure is not None, "a network without a source was asked for"
    raise loading_failure(name, failure, f" from {' or '.join(sources)}") from failure


def loading_failure(name: str, error: Exception, source: str = "") -> CheckpointError:
    """Why the published weights of a network could not be loaded, in one sentence; ``source`` says ' from ...'."""
    reason = first_line(error)
    if _is_network_failure(error):
        problem, remedy = f"There is no network to fetch the pretrained weights of {name}{source}", "connect"
    elif "invalid hash" in reason:
        problem, remedy = f"The file fetched{source} is not the published one for {name}", "try again"
    elif "loading state_dict" in reason:
        problem = f"The pretrained weights of {name} do not fit the layers that these arguments build"
        remedy = "leave out the arguments that change them"
    else:
        problem, remedy = f"The pretrained weights of {name} could not be loaded{source}", "try again"
    return CheckpointError(
        f"{problem} ({reason}); {remedy}, or create the model without pretrained=True and use load_checkpoint on a "
        "file."
    )


def hub_file(hub_id: str, cache_dir: str | Path | None = None) -> Path:
    """The weights of a hub repository, ``owner/name`` or ``owner/name@revision``, as a file in the hub's cache.

    A file that is not in the cache is downloaded. The hub names a large file by its SHA-256, and the file is held to
    it. Raises ``CheckpointError`` where it is another, and the hub's and the network's own errors.
    """
    repository, _, revision = hub_id.partition("@")
    where: Any = {"revision": revision or None, "cache_dir": cache_dir}
    for name in _FILES:
        found = huggingface_hub.try_to_load_from_cache(repository, name, **where)
        if isinstance(found, str):
            return _checked(Path(found), hub_id)
    for name in _FILES:
        try:
            # Asked for once: the download itself tries again and again where there is no network.
            huggingface_hub.get_hf_file_metadata(
                huggingface_hub.hf_hub_url(repository, name, revision=revision or None)
            )
        except RemoteEntryNotFoundError:
            continue
        return _checked(Path(huggingface_hub.hf_hub_download(repository, name, **where)), hub_id)
    raise CheckpointError(f"{hub_id} holds none of {', '.join(_FILES)}; give the file of its weights.")


def _checked(path: Path, hub_id: str) -> Path:
    blob = path.resolve()
    if not _SHA256.fullmatch(blob.name):
        return path
    digest = hashlib.sha256()
    with blob.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    if digest.hexdigest() != blob.name:
        raise CheckpointError(
            f"The weights of {hub_id} in {blob} are not the published ones: their SHA-256 is "
            f"{digest.hexdigest()[:8]}…, not {blob.name[:8]}…; delete that file and fetch them again."
        )
    return path


def _is_network_failure(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that nothing could be reached."""
    while error is not None:
        if isinstance(error, HTTPError):
            return False  # someone answered
        if isinstance(error, _UNREACHABLE):
            return True
        error = error.__cause__ or error.__context__
    return False


def _released_file(url: str, cache_dir: str | Path | None) -> Path:
    return Path(download_cached_file(url, check_hash=True, cache_dir=cache_dir))
