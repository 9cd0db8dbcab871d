"""A teacher's answers kept on disk, for training whose images are the same in every epoch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed import all_gather_object
from torch.utils.data import DataLoader

from refold.errors import InputError
from refold.files import make_folder, written_aside
from refold.training.batches import Batch, Collate, SeededImages, Transform
from refold.training.images import Images
from refold.training.pictures import Source
from refold.training.progress import progress
from refold.training.recipe import Recipe
from refold.training.teacher import Teacher

_DIGEST = 16
_SECONDS_BETWEEN_FILES = 60.0
_IMAGE_KEYS = ("image_size", "crop_scale", "crop_ratio", "crop_padding")


@dataclass(frozen=True)
class Questions:
    """The training images that a teacher can be asked about, as the student sees them.

    They are the same in every epoch and asked about by ``processes`` processes, of which this is the ``rank``-th, in
    batches of ``batch_size``. ``preprocessing`` and ``recipe`` say how ``prepare`` prepares them.
    """

    images: Images
    classes: int
    prepare: Transform
    collate: Collate
    preprocessing: dict[str, Any]
    recipe: Recipe
    batch_size: int
    seed: int
    workers: int
    rank: int
    processes: int
    device: torch.device

    def batches(self, indices: list[int]) -> Iterable[Batch]:
        """The images with these indices."""
        keys = [(0, index) for index in indices]
        size = self.batch_size
        return DataLoader(
            SeededImages(self.images, self.prepare, self.seed),
            batch_sampler=[keys[start : start + size] for start in range(0, len(keys), size)],
            collate_fn=self.collate,
            num_workers=self.workers,
        )


class TeacherCache:
    """Ask a teacher once about each training image, and keep its logits in ``folder`` for this and other runs.

    A file belongs to one teacher, with its weights, and one preparation of the images; in it answers are found by what
    an image holds. So another teacher, another image size and changed images are asked anew, and nothing else is.
    ``changing`` are the values of the recipe that change images from epoch to epoch.
    Raises `InputError` where there are such, or the recipe asks for the teacher's features.
    """

    def __init__(self, folder: Path, recipe: Recipe, changing: Sequence[str], console: Console) -> None:
        if changing:
            raise InputError(
                f"The teacher's answers cannot be kept: {', '.join(changing)} of the recipe make each epoch's images "
                "others. Turn them off (crop_scale=[1,1], crop_ratio=[1,1], all else 0 or null), or keep no answers."
            )
        if recipe.feature_weight or recipe.relation_weight:
            raise InputError(
                "The teacher's answers are kept, not its features; leave feature_weight and relation_weight at 0, or "
                "keep no answers."
            )
        self.folder = folder
        self.console = console

    def answers(self, teacher: Teacher, questions: Questions) -> Tensor:
        """The logits ``(training images, classes)``; those of an image that cannot be read are no numbers."""
        images = questions.images
        path = make_folder(self.folder) / f"{_key(teacher, questions)}.safetensors"
        with progress(self.console) as shown:
            task = shown.add_task("Looking for the teacher's answers", total=len(images), note="")
            digests = [_digest(source, lambda: shown.advance(task)) for source in images.sources]
        known = _read(path)
        before = len(known)
        is_first = questions.rank == 0
        missing = [index for index, digest in enumerate(digests) if digest not in known]
        own = missing[questions.rank :: questions.processes]
        self._ask(teacher, questions, digests, own, known, path if is_first else None)
        if questions.processes > 1:
            everybody: list[Any] = [None] * questions.processes
            all_gather_object(everybody, {digests[i]: known[digests[i]] for i in own if digests[i] in known})
            for answers in everybody:
                known |= answers
            # Machines that do not share the folder may have missed others.
            left = [index for index in missing if digests[index] not in known]
            self._ask(teacher, questions, digests, left, known, None)
        if is_first and len(known) > before:
            _write(path, known)
        # An image that cannot be read now may be readable later: its answer is then no number, and training says so.
        unknown = torch.full((questions.classes,), torch.nan)
        return torch.stack([known.get(digest, unknown) for digest in digests])

    def _ask(
        self,
        teacher: Teacher,
        questions: Questions,
        digests: list[bytes],
        indices: list[int],
        known: dict[bytes, Tensor],
        path: Path | None,
    ) -> None:
        """Ask the teacher about some images, and with a ``path`` write what is known from time to time."""
        if not indices:
            return
        teacher.to(questions.device)
        with progress(self.console) as shown:
            task = shown.add_task("Asking the teacher", total=len(indices), note="")
            written = time.monotonic()
            for batch in questions.batches(indices):
                if len(batch.images):
                    answers = teacher(batch.images.to(questions.device)).float().cpu()
                    known.update(zip((digests[i] for i in batch.indices.tolist()), answers, strict=True))
                shown.advance(task, len(batch.images) + len(batch.unreadable))
                if path is not None and time.monotonic() > written + _SECONDS_BETWEEN_FILES:
                    _write(path, known)
                    written = time.monotonic()


def _key(teacher: Teacher, questions: Questions) -> str:
    """A digest of what decides the teacher's answer to an image."""
    digest = hashlib.sha256()
    recipe = dataclasses.asdict(questions.recipe)
    order = None if teacher.class_order is None else teacher.class_order.tolist()
    prepared = {
        "preprocessing": questions.preprocessing,
        "recipe": {key: recipe[key] for key in _IMAGE_KEYS},
        "size": teacher.size,
        "scale": teacher.scale.flatten().tolist(),
        "shift": teacher.shift.flatten().tolist(),
        "classes": order,
        "network": re.sub(r" at 0x[0-9a-f]+", "", repr(teacher.network)),
    }
    digest.update(json.dumps(prepared, sort_keys=True, default=list).encode())
    for name, value in sorted(teacher.network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[: 2 * _DIGEST]


def _digest(source: Source, advance: Callable[[], object]) -> bytes:
    """Of the pixels of an image in memory, or of the bytes of a file."""
    advance()
    digest = hashlib.blake2b(digest_size=_DIGEST)
    if isinstance(source, Image.Image):
        digest.update(f"{source.mode} {source.size}".encode())
        digest.update(source.tobytes())
    else:
        try:
            digest.update(source.read_bytes())
        except OSError:
            digest.update(str(source).encode())  # it will be named as unreadable
    return digest.digest()


def _read(path: Path) -> dict[bytes, Tensor]:
    if not path.is_file():
        return {}
    try:
        tensors = load_file(path)
        digests, answers = tensors["images"], tensors["answers"]
    except (SafetensorError, KeyError, OSError):
        return {}  # damaged: asked anew and written over
    return {bytes(digest.tolist()): logits for digest, logits in zip(digests, answers, strict=True)}


def _write(path: Path, known: dict[bytes, Tensor]) -> None:
    digests = torch.tensor([list(digest) for digest in known], dtype=torch.uint8)
    with written_aside(path) as aside:
        save_file({"images": digests, "answers": torch.stack(list(known.values()))}, aside)
