"""Reading one picture as it is meant, whatever file it is in, and finding the pictures in a folder."""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS

from refold.errors import InputError, some


class Packed(Protocol):
    """An encoded picture inside something larger; as text it says where."""

    def read_bytes(self) -> bytes: ...


SUFFIXES: tuple[str, ...] = IMG_EXTENSIONS

Source = Image.Image | Path | Packed

LARGEST_PICTURE = 100_000_000
"""Pixels of the largest picture that is read: the 300 MB of them would fill the memory many times over."""

# The limit above says the same in words, as an error.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Pillow's remarks on broken metadata name no file, and a picture that suffers from them is refused by name.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

Pixels = np.ndarray[Any, Any]

_NARROWEST = 100

# What may be behind the suffixes above, whatever the file's own says: a decoder each. Others of Pillow's start a
# program (Ghostscript for EPS), follow a file to other files, or read what is no picture of a camera or a drawing.
_FORMATS = ["JPEG", "PNG", "TIFF", "WEBP", "BMP", "PPM", "GIF", "AVIF", "JPEG2000", "TGA", "ICO"]
Image.init()
_FORMATS = [name for name in _FORMATS if name in Image.OPEN]  # older versions of Pillow have no AVIF

_OF_16_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
# Where Pillow's "I", a whole number of 32 bits, stands for the 16 bits of these formats.
_WIDENED = ("PNG", "PPM")
_OTHER_PICTURES = (
    ".gif", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".jfif", ".psd", ".svg", ".ico", ".tga", ".eps", ".exr",
    ".hdr", ".npy", ".dcm", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw",
)  # fmt: skip
# Tags of TIFF files.
_BITS, _PHOTOMETRIC, _PLANES, _SAMPLE_FORMAT = 258, 262, 284, 339
_NOT_OF_THE_DATA = ("__MACOSX", "@eaDir", "$RECYCLE.BIN")


def read_image(source: Source) -> Image.Image:
    """Decode a picture as RGB of 8 bits, upright as its EXIF says.

    16 bits are scaled to 8; numbers with a fraction are read as 0 to 1, 0 to 255 or 0 to 65,535, the first that holds
    them all, unless they would be nearly black in it; what is transparent becomes white; of several frames the first
    is taken.
    Raises `InputError`, naming the file, where it cannot be decoded, its numbers have no range that is known, it has
    more than `LARGEST_PICTURE` pixels, or one side is more than a hundred times the other.
    """
    if isinstance(source, Image.Image):
        return source
    try:
        with _opened(source) as file, Image.open(file, formats=_FORMATS) as image:
            _check_size(source, image.width, image.height)
            _check_samples(image)
            is_inverted = image.format == "TIFF" and _tag(image, _PHOTOMETRIC) == 0
            return _as_rgb(ImageOps.exif_transpose(image), image.format, is_inverted)
    except UnidentifiedImageError as error:
        raise InputError(
            f"The image '{source}' cannot be read (no kind of image that is known); save it with 8 or 16 bits as PNG, "
            "or remove it."
        ) from error
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(_too_large(source, "far more pixels")) from error
    except Exception as error:  # a damaged file may raise anything in Pillow's readers
        reason = str(error) or type(error).__name__
        raise InputError(f"The image '{source}' cannot be read ({reason}); repair or remove it.") from error


def _opened(source: Path | Packed) -> IO[bytes]:
    # Pillow maps the file of a path into memory, and then forgets to turn an uncompressed TIFF as its EXIF says.
    return source.open("rb") if isinstance(source, Path) else io.BytesIO(source.read_bytes())


def _check_size(source: Source, width: int, height: int) -> None:
    if width * height > LARGEST_PICTURE:
        raise InputError(_too_large(source, f"{width} x {height} pixels"))
    if max(width, height) > _NARROWEST * min(width, height):
        # Enlarged until the shorter side fits a network, it would fill the memory.
        raise InputError(
            f"The image '{source}' is too narrow: it has {width} x {height} pixels, over {_NARROWEST} to 1; crop it."
        )


def _too_large(source: Source, size: str) -> str:
    most = f"{LARGEST_PICTURE // 10**6} million"
    return f"The image '{source}' is too large: it has {size}, at most {most} are read; shrink it."


def _tag(image: Image.Image, number: int) -> Any:
    """A tag of a TIFF file; of one value for each colour, the largest."""
    value = getattr(image, "tag_v2", {}).get(number)
    return max(value, default=None) if isinstance(value, tuple) else value


def _check_samples(image: Image.Image) -> None:
    """Raise ValueError for the TIFF files that Pillow takes for others without a word."""
    if image.format != "TIFF":
        return
    bits, planes = _tag(image, _BITS) or 1, _tag(image, _PLANES)
    if _tag(image, _SAMPLE_FORMAT) == 2:
        raise ValueError("whole numbers with a sign, whose range is not known; save 8 or 16 bits without")
    if planes == 2 and bits > 8 and len(image.getbands()) > 1:
        raise ValueError(
            f"a plane of {bits} bits for each colour; save the colours of a pixel together, or 8 bits"
        )


def _as_rgb(image: Image.Image, format: str | None, is_inverted: bool) -> Image.Image:
    """The picture as RGB; in one that ``is_inverted``, 0 is white, which Pillow minds up to 8 bits alone."""
    if image.mode in (*_OF_16_BITS, "I"):
        values = np.asarray(image)
        if image.mode == "I":
            values = _whole_numbers(values, format)
        elif isinstance(image.info.get("transparency"), int):
            values = np.where(values == image.info["transparency"], 65535, values)
        return _grey((65535 - values if is_inverted else values) / 257)
    if image.mode == "F":
        values = _with_fraction(np.asarray(image))
        return _grey(255 - values if is_inverted else values)
    clear = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(clear, tuple) and max(clear) > 255:
        # A colour of 16 bits, which is compared with those of 8 that Pillow keeps.
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        white = Image.new("RGBA", colours.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, colours).convert("RGB")
    return image.convert("RGB")


def _grey(values: Pixels) -> Image.Image:
    return Image.fromarray(values.round().astype(np.uint8)).convert("RGB")


def _whole_numbers(values: Pixels, format: str | None) -> Pixels:
    if format not in _WIDENED or values.min() < 0 or values.max() > 65535:
        raise ValueError("whole numbers of 32 bits, whose range is not known; save 8 or 16 bits")
    return values


def _with_fraction(values: Pixels) -> Pixels:
    """The values from 0 to 255, by the narrowest usual range that holds them all, unless that made them nearly black.

    Light that goes a little beyond 1 or 255 would be, and so would 12 bits in a range of 16.
    """
    least, most = float(values.min()), float(values.max())
    for end, darkest in ((1.0, 0.0), (255.0, 255 / 16), (65535.0, 65536 / 16)):
        if least >= 0 and most <= end:
            if most < darkest:
                break
            return values.astype(np.float64) * (255 / end)
    raise ValueError(f"numbers from {least:g} to {most:g}, whose range is not known; save them from 0 to 1")


@dataclass
class LeftOut:
    """The files in a folder that are not read, by the reason."""

    files: dict[str, list[Path]] = field(default_factory=dict)

    def add(self, reason: str, path: Path) -> None:
        """Count a file, or a folder with all that is in it."""
        self.files.setdefault(reason, []).append(path)

    def notes(self, root: Path | None = None) -> list[str]:
        """One sentence a reason: how many, and the first of them by name, within ``root``."""
        sentences = []
        for reason, paths in self.files.items():
            names = [(path if root is None else path.relative_to(root)).as_posix() for path in sorted(paths)]
            sentences.append(f"Left out: {len(names):,} {reason} ({some(names)}).")
        return sentences


def find_pictures(folder: Path, left_out: LeftOut) -> list[Path]:
    """The pictures in a folder and in the folders in it, in order; what else lies there is added to ``left_out``."""
    found: list[Path] = []
    for place, folders, files in os.walk(folder):
        here = Path(place)
        for name in list(folders):
            if is_no_data(name):
                folders.remove(name)
                if any(file for _, _, inside in os.walk(here / name) for file in inside):
                    left_out.add("hidden or system folders", here / name)
        for name in files:
            path, suffix = here / name, Path(name).suffix.lower()
            if is_no_data(name):
                if suffix in SUFFIXES:
                    left_out.add("hidden files", path)
            elif suffix in SUFFIXES and not is_file(path):
                left_out.add("links to nothing, pipes and their like", path)
            elif suffix in SUFFIXES:
                found.append(path)
            elif suffix in _OTHER_PICTURES:
                left_out.add(f"pictures of another format than {', '.join(SUFFIXES)}", path)
            else:
                left_out.add("files that are no pictures", path)
    return sorted(found)


def is_file(path: Path) -> bool:
    """Whether there is a file to read: no pipe, at which reading would wait for ever, and no link to nothing."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def find_images(paths: Sequence[Path], left_out: LeftOut) -> list[Path]:
    """The files given, and the pictures in the folders given, in order; what else lies there goes to ``left_out``.

    Raises `InputError` where a path does not exist or a folder holds no pictures.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = find_pictures(path, left_out)
            if not inside:
                raise InputError(f"The folder '{path}' holds no images ({', '.join(SUFFIXES)}).")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise InputError(f"There is no image '{path}'; check the path.")
    return found


def is_no_data(name: str) -> bool:
    """Whether a file or folder of that name is hidden, or what an operating system leaves beside the data."""
    return name.startswith(".") or name in _NOT_OF_THE_DATA


def sizes_of(sources: Sequence[Source]) -> Counter[tuple[int, int]]:
    """How many pictures have which width and height; the files' heads are read, unreadable ones are not counted."""
    counted: Counter[tuple[int, int]] = Counter()
    for source in sources:
        size = size_of(source)
        if size is not None:
            counted[size] += 1
    return counted


def size_of(source: Source) -> tuple[int, int] | None:
    if isinstance(source, Image.Image):
        return source.size
    try:
        with _opened(source) as file, Image.open(file, formats=_FORMATS) as image:
            size: tuple[int, int] = image.size
            return size
    except Exception:  # said when it is read
        return None
