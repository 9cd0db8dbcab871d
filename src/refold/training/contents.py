"""What images hold, told apart by digests: the same file twice, and files that changed since a run began."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from refold.training.pictures import Source

_BYTES = 8
_END = 4096
_BLOCK = 1 << 20


def digest_of(source: Source) -> str:
    """A short digest of an image: of its pixels in memory; of a file's size, head and tail; or of where it lies.

    The whole of a file is not read, so that a large set of images is looked through in seconds.
    """
    digest = hashlib.blake2b(digest_size=_BYTES)
    if isinstance(source, Image.Image):
        digest.update(f"{source.mode} {source.size}".encode())
        digest.update(source.tobytes())
    elif isinstance(source, Path):
        try:
            with source.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                digest.update(str(size).encode())
                digest.update(file.read(_END))
                file.seek(max(_END, size - _END))
                digest.update(file.read(_END))
        except OSError:
            pass  # named when it is read
    else:
        digest.update(f"{source} {getattr(source, 'size', '')}".encode(errors="surrogateescape"))
    return digest.hexdigest()


def same_files(paths: Sequence[Path]) -> list[list[Path]]:
    """The groups of two files or more that hold the same, each in the order of ``paths``."""
    by_digest: defaultdict[str, list[Path]] = defaultdict(list)
    for path in paths:
        by_digest[digest_of(path)].append(path)
    groups: defaultdict[str, list[Path]] = defaultdict(list)
    for alike in by_digest.values():
        if len(alike) > 1:
            for path in alike:
                groups[_whole(path)].append(path)
    return [group for group in groups.values() if len(group) > 1]


def _whole(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=2 * _BYTES)
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError:
        return str(path)  # like no other
    return digest.hexdigest()
