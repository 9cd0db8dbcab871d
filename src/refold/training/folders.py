"""Images in folders, one a class: which folder is what, and what of it is left out."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from refold.errors import InputError, some
from refold.files import PathLike
from refold.training.contents import same_files
from refold.training.images import Images, LabelledImages, hold_out_share
from refold.training.pictures import SUFFIXES, LeftOut, Source, find_pictures, is_no_data

# What the folders of a split are called, bare of case, separators and of "set", "data", "images" or "split" behind.
TRAINING = ("train", "training", "trn")
VALIDATION = ("val", "valid", "validation", "eval", "evaluation", "dev", "development", "heldout", "holdout")
TEST = ("test", "testing", "tst")
_BEHIND = re.compile(r"(sets?|data|images?|imgs?|split|samples?)$")
# Folders between a class and its images that say nothing of classes.
_PLAIN = {
    "images",
    "image",
    "imgs",
    "img",
    "photos",
    "pictures",
    "jpeg",
    "jpegs",
    "jpg",
    "png",
    "data",
    "raw",
}
_MOST_COMPARED = 200_000


def class_folders(folder: PathLike, seed: int = 0) -> LabelledImages:
    """The images of a folder with one folder a class; a fifth of each class is held out.

    Where the folder holds a folder to train on and one to measure on (``train`` and ``val`` or ``test``, by any of
    their usual names in any case), that split is used instead. The images' ``notes`` say which, what was left out,
    and which files are there more than once: within a class the first of them is used, the others are left out.
    Raises `InputError` where the folder is missing, a class has no images, there are fewer than two classes, or every
    folder holds the same folders, so that classes and something else may be mistaken for each other.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(
            f"There is no folder '{root}'; give a folder that holds one folder of images a class."
        )
    training_root, held_out_root, notes = _split_of(root)
    names, training, training_notes = _scan(training_root)
    notes += training_notes
    if held_out_root is None:
        try:
            shared = hold_out_share(str(root), names, training.sources, training.targets, seed, mirror=True)
        except InputError as error:
            raise InputError(" ".join([str(error), *notes])) from error
        return replace(shared, notes=tuple(notes), root=root)
    held_out_names, held_out, held_out_notes = _scan(held_out_root)
    if names != held_out_names:
        stranger = sorted(set(names) ^ set(held_out_names))[0]
        raise InputError(
            f"The class '{stranger}' is in only one of '{training_root}' and '{held_out_root}'; "
            "both need the same class folders."
        )
    notes += [*held_out_notes, *_in_both(training, held_out, root)]
    return LabelledImages(str(root), names, training, held_out, mirror=True, notes=tuple(notes), root=root)


def _split_of(root: Path) -> tuple[Path, Path | None, list[str]]:
    """The folder to train on, the one to measure on if there is one, and what is to be said of the choice."""
    folders = _folders(root)
    training, validation, test = (
        [folder for folder in folders if bare_name(folder.name) in names]
        for names in (TRAINING, VALIDATION, TEST)
    )
    if not training and (validation or test) and all(map(_holds_classes, validation + test)):
        names = [f"'{folder.name}'" for folder in validation + test]
        raise InputError(
            f"'{root}' holds {' and '.join(names)} to measure on by name, but nothing to train on; add a 'train' "
            "folder, or give a folder with one folder of images a class."
        )
    if not training or not (validation or test or folders == training or any(map(_holds_classes, training))):
        return root, None, []
    if len(training) > 1:
        names = [f"'{folder.name}'" for folder in training]
        raise InputError(f"'{root}' holds {' and '.join(names)}, all to train on; leave one of them there.")
    if not _folders(training[0]):
        raise InputError(
            f"'{training[0]}' is what to train on by its name, but holds no class folders; put its images into one "
            "folder a class."
        )
    held_out = next((folder for folder in (*validation, *test) if _folders(folder)), None)
    measured = "a fifth of each class of it" if held_out is None else f"'{held_out.name}'"
    notes = [f"Trained on '{training[0].name}' of '{root}', measured on {measured}."]
    others = [folder.name for folder in folders if folder not in (training[0], held_out)]
    if others:
        notes.append(f"Left out: {len(others)} folders beside them ({some(others)}).")
    return training[0], held_out, notes


def bare_name(name: str) -> str:
    """The name of a folder without case, separators, numbers, and "set", "data" or "images" behind."""
    letters = re.sub(r"[^a-z]", "", name.lower())
    return _BEHIND.sub("", letters) or letters


def _folders(root: Path) -> list[Path]:
    return sorted(entry for entry in root.iterdir() if entry.is_dir() and not is_no_data(entry.name))


def _holds_classes(folder: Path) -> bool:
    """Whether a folder holds folders as of classes, and no images of its own."""
    inside = _folders(folder)
    if {entry.name.lower() for entry in inside} <= _PLAIN:
        return False
    return not any(entry.suffix.lower() in SUFFIXES and entry.is_file() for entry in folder.iterdir())


def _scan(root: Path) -> tuple[list[str], Images, list[str]]:
    """The classes in a folder, their images, and what is to be said of them."""
    folders = _folders(root)
    if len(folders) < 2:
        found = f"only the class '{folders[0].name}'" if folders else "no class folders"
        inside = f", such as '{folders[0]}'" if folders and _folders(folders[0]) else ""
        raise InputError(
            f"'{root}' holds {found}; give a folder with two or more folders of images, one a class{inside}."
        )
    _check_classes(root, folders)
    alike = _differ_little([folder.name for folder in folders])
    left_out = LeftOut()
    for entry in sorted(root.iterdir()):
        if entry.is_file() and not is_no_data(entry.name) and entry.suffix.lower() in SUFFIXES:
            left_out.add("images beside the class folders, of no class", entry)
        elif entry.is_dir() and is_no_data(entry.name):
            left_out.add("hidden or system folders", entry)
    by_class: list[list[Path]] = []
    for folder in folders:
        files = find_pictures(folder, left_out)
        if not files:
            others = "; ".join(left_out.notes(root))
            raise InputError(
                f"The class folder '{folder}' holds no images; add some ({', '.join(SUFFIXES)}) or "
                f"remove it.{f' ({others})' if others else ''}"
            )
        by_class.append(files)
    kept, doubles = _without_doubles(root, by_class, left_out)
    sources: list[Source] = [file for files in kept for file in files]
    targets = [index for index, files in enumerate(kept) for _ in files]
    return (
        [folder.name for folder in folders],
        Images(sources, targets),
        [*alike, *left_out.notes(root), *doubles],
    )


def _differ_little(names: list[str]) -> list[str]:
    """What is to be said of classes that look like one.

    Raises `InputError` where a name is no text, which no file that is written could hold.
    """
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"The class folder '{name}' has a name that is not UTF-8; rename it.") from error
        alike[unicodedata.normalize("NFKC", name).casefold().strip()].append(name)
    groups = [" = ".join(group) for group in alike.values() if len(group) > 1]
    return [f"Classes whose names differ in case or spelling alone: {some(groups)}."] if groups else []


def _check_classes(root: Path, folders: list[Path]) -> None:
    """Raise `InputError` where all hold the same folders, or one a split: then they are not the classes."""
    inside = [{entry.name for entry in _folders(folder)} for folder in folders]
    shared = inside[0]
    if not {name.lower() for name in shared} <= _PLAIN and all(names == shared for names in inside):
        raise InputError(
            f"Each folder of '{root}' ({some([folder.name for folder in folders])}) holds the same folders "
            f"({some(sorted(shared))}), so that it is not clear which are the classes; give a folder with one folder "
            "of images a class, or with 'train' and 'val' that hold them."
        )
    for folder, names in zip(folders, inside, strict=True):
        bare = {bare_name(name) for name in names}
        if bare & {*TRAINING} and bare & {*VALIDATION, *TEST}:
            raise InputError(
                f"The class folder '{folder}' holds a split of its own ({some(sorted(names))}); give a folder with "
                "'train' and 'val' that hold one folder of images a class."
            )


def _without_doubles(
    root: Path, found: list[list[Path]], left_out: LeftOut
) -> tuple[list[list[Path]], list[str]]:
    """The files of each class without those that are there already, and what is to be said of those in two classes."""
    everything = [file for files in found for file in files]
    if len(everything) > _MOST_COMPARED:
        return found, [f"Not looked for the same file twice among {len(everything):,} images."]
    class_of = {file: index for index, files in enumerate(found) for file in files}
    left: set[Path] = set()
    in_two: list[str] = []
    for group in same_files(everything):
        by_class: defaultdict[int, list[Path]] = defaultdict(list)
        for file in group:
            by_class[class_of[file]].append(file)
        for files in by_class.values():
            for double in files[1:]:
                left.add(double)
                left_out.add("doubles of another file of their class", double)
        if len(by_class) > 1:
            firsts = [files[0].relative_to(root).as_posix() for files in by_class.values()]
            in_two.append(" = ".join(firsts))
    notes = []
    if in_two:
        notes.append(f"{len(in_two):,} images are in more than one class: {some(in_two)}.")
    return [[file for file in files if file not in left] for files in found], notes


def _in_both(training: Images, held_out: Images, root: Path) -> list[str]:
    """What is to be said of files that are trained on and measured on."""
    paths = [source for source in (*training.sources, *held_out.sources) if isinstance(source, Path)]
    if len(paths) > _MOST_COMPARED:
        return []
    measured = {source for source in held_out.sources if isinstance(source, Path)}
    shared = [
        next(path for path in group if path in measured).relative_to(root).as_posix()
        for group in same_files(paths)
        if measured.intersection(group) and not measured.issuperset(group)
    ]
    if not shared:
        return []
    return [
        f"{len(shared):,} of the {len(measured):,} held-out images are among the training images, too "
        f"({some(shared)}): the accuracy will be too high."
    ]
