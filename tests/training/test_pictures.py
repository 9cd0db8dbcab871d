"""Pictures are read as they are meant, or refused by name; what lies beside them is counted."""

import importlib
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from refold.errors import InputError
from refold.training import pictures
from refold.training.pictures import LeftOut, find_pictures, read_image, sizes_of

RAMP = np.linspace(0, 1, 12).reshape(3, 4)
EIGHT_BITS = (RAMP * 255).round().astype(np.uint8)


def pixels(path: Path) -> np.ndarray:
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("name", ["16.png", "16.tif", "16.pgm"])
def test_16_bits_are_scaled(tmp_path: Path, name: str) -> None:
    values = (RAMP * 65535).round().astype(np.uint16)
    if name.endswith(".pgm"):  # not every version of Pillow writes these
        (tmp_path / name).write_bytes(b"P5 4 3 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(tmp_path / name)
    assert np.array_equal(pixels(tmp_path / name), np.repeat(EIGHT_BITS[..., None], 3, 2))


def test_16_bits_of_the_other_order_of_bytes(tmp_path: Path) -> None:
    Image.fromarray((RAMP * 65535).round().astype(">u2")).save(tmp_path / "big.tif")
    assert np.array_equal(pixels(tmp_path / "big.tif")[..., 0], EIGHT_BITS)


@pytest.mark.parametrize("end", [1.0, 255.0, 65535.0])
def test_fractions_are_read_by_their_range(tmp_path: Path, end: float) -> None:
    Image.fromarray((RAMP * end).astype(np.float32)).save(tmp_path / "f.tif")
    assert np.array_equal(pixels(tmp_path / "f.tif")[..., 1], EIGHT_BITS)


@pytest.mark.parametrize("values", [RAMP - 0.5, RAMP * 1e6, RAMP * np.nan])
def test_fractions_of_no_known_range_are_refused(tmp_path: Path, values: np.ndarray) -> None:
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(
        InputError,
        match=r"f\.tif' cannot be read \(numbers from .*, whose range is not known; save them from 0 to 1",
    ):
        read_image(tmp_path / "f.tif")


@pytest.mark.parametrize("most", [1.2, 15.0, 256.0, 4000.0])
def test_fractions_that_would_be_nearly_black_in_the_range_that_holds_them_are_refused(
    tmp_path: Path, most: float
) -> None:
    Image.fromarray((RAMP * most).astype(np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(
        InputError, match=r"numbers from 0 to .*, whose range is not known; save them from 0 to 1"
    ):
        read_image(tmp_path / "f.tif")


def write_tiff(
    path: Path, values: np.ndarray, *, photometric: int = 1, sample_format: int = 1, planes: int = 1
) -> None:
    """An uncompressed TIFF, as Pillow does not write it."""
    height, width, colours = values.shape
    strips = values.transpose(2, 0, 1) if planes == 2 else values[None]
    data = values.dtype.itemsize * 8
    size = strips[0].nbytes
    starts = [8 + size * index for index in range(len(strips))]
    tags = {
        256: [width], 257: [height], 258: [data] * colours, 259: [1], 262: [photometric], 273: starts, 277: [colours],
        278: [height], 279: [size] * len(strips), 284: [planes], 339: [sample_format] * colours,
    }  # fmt: skip
    entries, longer, behind = b"", b"", 8 + strips.nbytes + 2 + 12 * len(tags) + 4
    for number, numbers in tags.items():
        packed = struct.pack(f"<{len(numbers)}I", *numbers)
        if len(packed) > 4:
            packed, longer = struct.pack("<I", behind + len(longer)), longer + packed
        entries += struct.pack("<HHI", number, 4, len(numbers)) + packed
    head = struct.pack("<2sHI", b"II", 42, 8 + strips.nbytes)
    path.write_bytes(head + strips.tobytes() + struct.pack("<H", len(tags)) + entries + bytes(4) + longer)


def test_white_is_0_where_the_file_says_so(tmp_path: Path) -> None:
    values = (RAMP * 65535).round().astype(np.uint16)[..., None]
    write_tiff(tmp_path / "white.tif", values, photometric=0)
    assert np.array_equal(pixels(tmp_path / "white.tif")[..., 0], 255 - EIGHT_BITS)
    write_tiff(tmp_path / "black.tif", values, photometric=1)
    assert np.array_equal(pixels(tmp_path / "black.tif")[..., 0], EIGHT_BITS)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32])
def test_whole_numbers_with_a_sign_are_refused(tmp_path: Path, dtype: type) -> None:
    write_tiff(tmp_path / "i.tif", (RAMP * 100 - 50).astype(dtype)[..., None], sample_format=2)
    with pytest.raises(InputError, match=r"i\.tif' cannot be read \(whole numbers with a sign"):
        read_image(tmp_path / "i.tif")


def test_planes_are_read_with_8_bits_and_refused_with_16(tmp_path: Path) -> None:
    colours = np.stack([EIGHT_BITS, 255 - EIGHT_BITS, EIGHT_BITS // 2], axis=-1)
    write_tiff(tmp_path / "8.tif", colours, photometric=2, planes=2)
    assert np.array_equal(pixels(tmp_path / "8.tif"), colours)
    write_tiff(tmp_path / "16.tif", colours.astype(np.uint16) * 257, photometric=2, planes=2)
    with pytest.raises(InputError, match=r"16\.tif' cannot be read \(a plane of 16 bits for each colour"):
        read_image(tmp_path / "16.tif")


@pytest.mark.parametrize("colours", [(3,), (3, 65535 - 3, 30000)])
def test_the_colour_that_a_png_of_16_bits_calls_transparent_is_white(
    tmp_path: Path, colours: tuple[int, ...]
) -> None:
    values = np.full((3, 4, len(colours)), 20000, ">u2")
    values[0, 0] = colours

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    rows = b"".join(b"\0" + row.tobytes() for row in values)
    head = struct.pack(">IIBBBBB", 4, 3, 16, 2 if len(colours) == 3 else 0, 0, 0, 0)
    clear = struct.pack(f">{len(colours)}H", *colours)
    chunks = ((b"IHDR", head), (b"tRNS", clear), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks))
    found = pixels(tmp_path / "a.png")
    assert found[0, 0].tolist() == [255, 255, 255]
    assert found[1, 1].tolist() == [78, 78, 78]


@pytest.mark.parametrize("kind", ["EPS", "PDF"])
def test_no_program_is_started_for_a_picture(tmp_path: Path, kind: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", kind)
    with pytest.raises(InputError, match=r"a\.jpg' cannot be read \(no kind of image that is known"):
        read_image(tmp_path / "a.jpg")


def test_broken_metadata_are_not_talked_about(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), (9, 9, 9)).save(
        tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x99" * 50
    )
    with warnings.catch_warnings(record=True) as said:
        importlib.reload(pictures)  # pytest has warnings of its own
        pictures.read_image(tmp_path / "a.jpg")
    assert said == []


def test_what_is_no_file_is_left_out(tmp_path: Path) -> None:
    Image.new("L", (2, 2)).save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "again.png").symlink_to("a.png")
    left_out = LeftOut()
    assert [path.name for path in find_pictures(tmp_path, left_out)] == ["a.png", "again.png"]
    assert left_out.notes(tmp_path) == [
        "Left out: 3 links to nothing, pipes and their like (gone.png, loop.png, pipe.png)."
    ]


def test_whole_numbers_of_32_bits_are_refused(tmp_path: Path) -> None:
    write_tiff(tmp_path / "i.tif", (RAMP * 1000).astype(np.uint32)[..., None])
    with pytest.raises(InputError, match=r"i\.tif' cannot be read \(whole numbers of 32 bits"):
        read_image(tmp_path / "i.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif", "16.png", "f.tif"])
def test_pictures_are_turned_as_exif_says(tmp_path: Path, orientation: int, name: str) -> None:
    upright = np.full((24, 32), 40, np.uint8)
    upright[:12, :16] = 200  # the upper left quarter
    turns: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud,
        5: np.transpose, 6: np.rot90, 7: lambda x: np.rot90(x, 2).T, 8: lambda x: np.rot90(x, 3),
    }  # fmt: skip
    stored = np.ascontiguousarray(turns[orientation](upright))
    kinds = {"16.png": stored.astype(np.uint16) * 257, "f.tif": (stored / 255).astype(np.float32)}
    image = Image.fromarray(kinds.get(name, stored))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / name, exif=exif)
    found = pixels(tmp_path / name)[..., 0]
    assert found.shape == (24, 32)
    assert np.abs(found.astype(int) - upright).max() <= 8  # JPEG and WebP lose a little


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    colours = np.zeros((1, 3, 4), np.uint8)
    colours[0, :, 3] = (0, 128, 255)
    Image.fromarray(colours, "RGBA").save(tmp_path / "rgba.png")
    assert pixels(tmp_path / "rgba.png")[0, :, 0].tolist() == [255, 127, 0]
    Image.fromarray(colours[..., 2:], "LA").save(tmp_path / "la.png")
    assert pixels(tmp_path / "la.png")[0, :, 0].tolist() == [255, 127, 0]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.save(tmp_path / "p.png", transparency=0)
    assert pixels(tmp_path / "p.png")[0].tolist() == [[255, 255, 255], [200, 100, 50]]
    Image.fromarray(np.array([[5, 9]], np.uint8)).save(tmp_path / "key.png", transparency=9)
    assert pixels(tmp_path / "key.png")[0].tolist() == [[5, 5, 5], [255, 255, 255]]


def test_other_colours(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "ink.jpg", quality=100)
    assert np.abs(pixels(tmp_path / "ink.jpg")[0, 0].astype(int) - [255, 0, 0]).max() <= 4
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "ink.tif")
    assert pixels(tmp_path / "ink.tif")[0, 0].tolist() == [255, 0, 0]
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bits.png")
    assert pixels(tmp_path / "bits.png")[0, :, 0].tolist() == [255, 0]


def test_a_large_picture_is_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "LARGEST_PICTURE", 99)
    Image.new("L", (10, 10)).save(tmp_path / "large.png")
    with pytest.raises(
        InputError, match=r"large\.png' is too large: it has 10 x 10 pixels, at most .*; shrink"
    ):
        read_image(tmp_path / "large.png")


def test_a_picture_that_claims_to_be_huge_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    Image.new("1", (30_000, 30_000)).save(path)
    with pytest.raises(InputError, match=r"bomb\.png' is too large: .*; shrink it"):
        read_image(path)


def test_what_is_left_out_is_counted_and_named(tmp_path: Path) -> None:
    def put(*names: str) -> None:
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (2, 2)).save(path, "PNG")

    put("b.png", "a/c.JPG", "a/d/e.webp")
    put("anim.gif", "phone.HEIC", "a/one.avif", "a/two.gif")
    put(
        "._b.png",
        ".hidden.jpg",
        "__MACOSX/b.png",
        "a/.ipynb_checkpoints/x-checkpoint.png",
        "a/d/__MACOSX/y.png",
    )
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / ".empty").mkdir()
    left_out = LeftOut()
    found = find_pictures(tmp_path, left_out)
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a/c.JPG", "a/d/e.webp", "b.png"]
    said = left_out.notes(tmp_path)
    assert any(
        "4 pictures of another format" in s and "(a/one.avif, a/two.gif, anim.gif and 1 more)" in s
        for s in said
    )
    assert any("2 hidden files (._b.png, .hidden.jpg)" in s for s in said)
    assert any("3 hidden or system folders (__MACOSX, a/.ipynb_checkpoints, a/d/__MACOSX)" in s for s in said)
    assert any("1 files that are no pictures (notes.txt)" in s for s in said)
    assert len(said) == 4


def test_sizes_are_counted(tmp_path: Path) -> None:
    for name, size in (("a.png", (4, 3)), ("b.png", (4, 3)), ("c.png", (5, 5))):
        Image.new("L", size).save(tmp_path / name)
    (tmp_path / "d.png").write_bytes(b"no image")
    assert sizes_of(sorted(tmp_path.iterdir())) == {(4, 3): 2, (5, 5): 1}


def test_a_picture_that_would_be_huge_once_enlarged_is_refused(tmp_path: Path) -> None:
    Image.new("L", (101, 1)).save(tmp_path / "line.png")
    with pytest.raises(InputError, match=r"line\.png' is too narrow: it has 101 x 1 pixels, .*; crop it"):
        read_image(tmp_path / "line.png")
    Image.new("L", (100, 1)).save(tmp_path / "line.png")
    assert read_image(tmp_path / "line.png").size == (100, 1)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif", "a.bmp", "a.ppm"])
def test_a_damaged_picture_is_read_or_refused_by_name(tmp_path: Path, name: str) -> None:
    generator = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "words"
    image = Image.fromarray(generator.integers(0, 255, (20, 24, 3), dtype=np.uint8))
    path = tmp_path / name
    image.save(path, **({} if name in ("a.bmp", "a.ppm") else {"exif": exif}))
    whole = path.read_bytes()
    refusals: list[str] = []
    for _ in range(150):
        damaged = bytearray(whole[: generator.integers(1, len(whole) + 1)])
        for place in generator.integers(0, len(damaged), generator.integers(1, 8)):
            damaged[place] = generator.integers(0, 256)
        # Most of what a picture is lies in its head.
        damaged[generator.integers(0, min(64, len(damaged)))] = generator.integers(0, 256)
        path.write_bytes(damaged)
        try:
            assert read_image(path).mode == "RGB"
        except InputError as error:
            refusals.append(str(error))
    assert refusals
    assert all(str(path) in refusal for refusal in refusals)
