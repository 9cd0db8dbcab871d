"""Images and their split; what cannot be used is named."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from refold.errors import InputError
from refold.training.folders import class_folders
from refold.training.images import Images, read_into_memory


def test_a_class_of_one_image_cannot_be_split(make: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=r"The class 'rare' of .* has one image"):
        class_folders(make({"common": 9, "rare": 1}))


def test_unreadable_images_are_named(make: Callable[..., Path]) -> None:
    root = make({"a": 4, "b": 4})
    truncated, foreign = root / "a" / "1.png", root / "b" / "text.jpg"
    whole = truncated.read_bytes()
    for path, content in ((truncated, whole[: len(whole) // 2]), (foreign, b"no image"), (foreign, b"")):
        path.write_bytes(content)
        images = class_folders(root)
        everything = Images([*images.training.sources, *images.held_out.sources], [0] * 8)
        with pytest.raises(InputError, match="cannot be read") as caught:
            read_into_memory(everything, 8)
        assert str(caught.value).startswith(f"The image '{path}' cannot")
        assert "\n" not in str(caught.value)
        path.write_bytes(whole)


def test_images_are_shrunk_once_and_keep_their_shape(make: Callable[..., Path]) -> None:
    images = class_folders(make({"a": 3, "b": 3}, size=(40, 20)))
    seen: list[int] = []
    held = read_into_memory(images.training, 10, lambda: seen.append(1))
    assert len(seen) == len(held) == len(images.training)
    assert {source.size for source in held.sources if isinstance(source, Image.Image)} == {(20, 10)}
    large = read_into_memory(images.training, 64)
    assert {source.size for source in large.sources if isinstance(source, Image.Image)} == {(40, 20)}


def test_unreadable_images_can_be_left_out(make: Callable[..., Path]) -> None:
    images = class_folders(make({"a": 5, "b": 5})).training
    Path(str(images.sources[2])).write_bytes(b"no image")
    messages: list[str] = []
    held = read_into_memory(images, 8, on_unreadable=messages.append)
    assert len(held) == len(images) - 1
    assert list(held.targets) == [target for index, target in enumerate(images.targets) if index != 2]
    assert [str(images.sources[2]) in message for message in messages] == [True]


def test_a_rare_class_is_held_out_too(make: Callable[..., Path]) -> None:
    root = make({"common": 60, "rare": 2})
    for seed in range(10):
        images = class_folders(root, seed)
        assert sorted(set(images.held_out.targets)) == sorted(set(images.training.targets)) == [0, 1]
        assert len(images.training) + len(images.held_out) == 62
