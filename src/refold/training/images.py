"""What a data set is: images that are read when they are needed, their classes, and which of them are held out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from sklearn.model_selection import train_test_split

from refold.errors import InputError
from refold.training.pictures import Source, read_image

HELD_OUT_SHARE = 0.2
LABELLED = "#"


@dataclass(frozen=True)
class Images:
    """Images, each in memory, a file or inside something larger, with the index of its class or its labels."""

    sources: Sequence[Source]
    targets: Sequence[Any]

    def __len__(self) -> int:
        return len(self.sources)


@dataclass(frozen=True)
class LabelledImages:
    """Training images and held-out images of the same classes.

    ``task`` is what they are for, by the name of a `refold.training.tasks.Task`: with "classify" each has a class, else
    `labels.Labels`. ``mirror`` says whether a mirrored image still belongs to its class. ``notes`` are sentences on
    what was left out or guessed; ``root`` is the folder that the images lie in, if they do; ``is_drawn`` says that the
    held-out images were drawn by a seed.
    """

    title: str
    class_names: list[str]
    training: Images
    held_out: Images
    mirror: bool
    notes: tuple[str, ...] = ()
    root: Path | None = None
    is_drawn: bool = False
    task: str = "classify"

    @property
    def keeps_size(self) -> bool:
        """Whether what belongs to an image is for the size that it has."""
        return self.task != "classify"

    def count_training(self) -> Counter[int]:
        """In how many training images each class occurs, where that is known without reading files."""
        counts: Counter[int] = Counter()
        for target in self.training.targets:
            if isinstance(target, int) or target.is_in_memory:
                counts.update(self.classes_of(target).keys())
        return counts

    def label_of(self, target: Any) -> str:
        """The name of a class, or `LABELLED` and the fingerprint of labels."""
        return self.class_names[target] if isinstance(target, int) else LABELLED + target.fingerprint()

    def classes_of(self, target: Any) -> Counter[int]:
        """How often each class occurs in an image."""
        return Counter([target]) if isinstance(target, int) else target.numbers()


def hold_out_share(
    title: str,
    class_names: list[str],
    sources: Sequence[Source],
    targets: Sequence[int],
    seed: int,
    *,
    mirror: bool,
) -> LabelledImages:
    """Hold out a fifth of each class, one image at least, chosen by the seed.

    Raises `InputError` where a class has but one image.
    """
    rarest, count = Counter(targets).most_common()[-1]
    if count < 2:
        raise InputError(
            f"The class '{class_names[rarest]}' of '{title}' has one image; each class needs at least two, "
            "one of them to hold out."
        )
    held_out_count = max(len(class_names), round(HELD_OUT_SHARE * len(targets)))
    training, held_out = train_test_split(
        range(len(targets)), test_size=held_out_count, stratify=targets, random_state=seed
    )
    # The share of a rare class may be none.
    for target in sorted(set(targets) - {targets[index] for index in held_out}):
        index = next(index for index in training if targets[index] == target)
        training.remove(index)
        held_out.append(index)
    return LabelledImages(
        title,
        class_names,
        training=_pick(sources, targets, training),
        held_out=_pick(sources, targets, held_out),
        mirror=mirror,
        is_drawn=True,
    )


def hold_out_labelled(
    title: str,
    class_names: list[str],
    sources: Sequence[Source],
    targets: Sequence[Any],
    seed: int,
    *,
    task: str,
    notes: Sequence[str] = (),
    root: Path | None = None,
) -> LabelledImages:
    """Hold out a fifth of images with labels, one at least, chosen by the seed.

    Raises `InputError` where there are fewer than two.
    """
    if len(sources) < 2:
        raise InputError(
            f"'{title}' has {len(sources)} images with labels; at least two are needed, one of them to hold out."
        )
    count = max(1, round(HELD_OUT_SHARE * len(sources)))
    training, held_out = train_test_split(range(len(sources)), test_size=count, random_state=seed)
    return LabelledImages(
        title,
        class_names,
        training=_pick(sources, targets, training),
        held_out=_pick(sources, targets, held_out),
        mirror=True,
        notes=tuple(notes),
        root=root,
        is_drawn=True,
        task=task,
    )


def _pick(sources: Sequence[Source], targets: Sequence[Any], indices: Iterable[int]) -> Images:
    chosen = sorted(indices)
    return Images([sources[index] for index in chosen], [targets[index] for index in chosen])


def read_into_memory(
    images: Images,
    image_size: int,
    on_image: Callable[[], object] = lambda: None,
    on_unreadable: Callable[[str], object] | None = None,
) -> Images:
    """Decode every image once, shrunk to a short side of ``image_size`` pixels if it is larger.

    An unreadable image is so found before training and not in the midst of it. ``on_image`` is called
    after each. ``on_unreadable`` gets the message of each image that cannot be read, which is then left out.
    Raises `InputError` at the first image that cannot be read where there is no ``on_unreadable``.
    """

    def read(source: Source) -> Image.Image | InputError:
        try:
            return _shrunk(read_image(source), image_size)
        except InputError as error:
            return error

    pictures: list[Source] = []
    targets: list[Any] = []
    with ThreadPoolExecutor() as pool:
        try:
            for picture, target in zip(pool.map(read, images.sources), images.targets, strict=True):
                if not isinstance(picture, InputError):
                    pictures.append(picture)
                    targets.append(target)
                elif on_unreadable is None:
                    raise picture
                else:
                    on_unreadable(str(picture))
                on_image()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return Images(pictures, targets)


def _shrunk(image: Image.Image, image_size: int) -> Image.Image:
    factor = image_size / min(image.size)
    if factor >= 1:
        return image
    width, height = (max(image_size, round(side * factor)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)
