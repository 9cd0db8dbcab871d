"""Going on with a run: its settings as written, what of them may change; and clearing its folder for another."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from refold.errors import InputError, RefoldError, first_line
from refold.training.options import declared_options
from refold.training.recipe import Recipe, ResolvedRecipe
from refold.training.settings import RUN, RUN_FILES, SAMPLE, SPLIT, STATE, Settings

_FIXED = {
    "optimizer": "its state belongs to the optimiser that it has",
    "batch_size": "an epoch would have other steps than the schedule counted",
    **dict.fromkeys(
        ("weight_bits", "weight_scales", "processor", "keep_identity", "calibration_images"),
        "the scales of the run belong to what it has",
    ),
}
# Values that bring parts of a run's state along where they are given, or are not zero.
_BRINGS_STATE = ("ema_decay", "feature_weight", "relation_weight")


def read_settings(folder: Path) -> Settings:
    """The settings of the run in a folder; raises `InputError` where there is none, or they are not understood."""
    path = folder / RUN
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        recipe = ResolvedRecipe.from_dict(written["recipe"])
        settings: Settings = TypeAdapter(Settings).validate_python(
            {**written, "recipe": recipe, "output": folder}
        )
    except FileNotFoundError as error:
        raise InputError(f"'{folder}' holds no run to go on with: there is no {RUN} in it.") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(
            f"'{path}' is not understood ('{place}': {first['msg']}); start the run again."
        ) from error
    except RefoldError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"'{path}' is not understood ({error!r}); start the run again.") from error
    settings.check()
    return settings


def changed(settings: Settings, changes: Mapping[str, Any], recipe_changes: Mapping[str, Any]) -> Settings:
    """The settings of a run that goes on, with what is given anew.

    Raises `InputError` for what makes no sense in a run that has begun, and `RecipeError` for a value that is not
    understood.
    """
    changeable = {declared.name: declared.option.changeable for declared in declared_options(type(settings))}
    for name, value in changes.items():
        if not changeable[name] and value != getattr(settings, name):
            raise InputError(
                f"{name} is {getattr(settings, name)!r} in the run of '{settings.output}' and cannot become {value!r}, "
                "for it decides what is learnt from the beginning; start a new run."
            )
    recipe = (
        settings.recipe.override(recipe_changes, "given on resuming") if recipe_changes else settings.recipe
    )
    _check_recipe(settings.recipe.recipe, recipe.recipe)
    kept = {name: value for name, value in changes.items() if changeable[name]}
    return dataclasses.replace(settings, **kept, recipe=recipe)


def _check_recipe(before: Recipe, now: Recipe) -> None:
    for key, reason in _FIXED.items():
        if getattr(before, key) != getattr(now, key):
            raise InputError(
                f"{key} is {getattr(before, key)!r} in this run and cannot become {getattr(now, key)!r}: {reason}; "
                "start a new run."
            )
    for key in _BRINGS_STATE:
        if bool(getattr(before, key)) != bool(getattr(now, key)):
            raise InputError(
                f"{key} is {getattr(before, key)!r} in this run and cannot become {getattr(now, key)!r}: what is kept "
                "of the run has no place for it; start a new run."
            )


def check_foreign(folder: Path) -> None:
    """Raise `InputError` where a folder without a run holds files that one would replace, such as a README of its own.

    What a run writes before its settings does not count: it may have been stopped there.
    """
    if (folder / RUN).exists():
        return
    theirs = [name for name in RUN_FILES if name not in (SPLIT, SAMPLE) and os.path.lexists(folder / name)]
    if theirs:
        raise InputError(
            f"'{folder}' holds no run, but {', '.join(theirs)}, which this one would replace; give another folder, or "
            "--overwrite."
        )


def remove_run(folder: Path) -> None:
    """Remove what a run wrote into its folder, and nothing else; its settings first, so that half of it is no run."""
    for name in RUN_FILES:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def readable_state(settings: Settings) -> str | None:
    """The state to go on from, if there is one.

    Raises `InputError` where it is damaged or another run's, where the best network that goes with it is gone, and
    where more epochs are done than there are to be.
    """
    state = settings.output / STATE
    if not state.is_file():
        return None
    try:
        with zipfile.ZipFile(state) as archive:
            damaged = archive.testzip()  # PyTorch itself does not look at the sums
        if damaged is not None:
            raise ValueError(f"{damaged} in it is damaged")
        written = torch.load(state, map_location="cpu", mmap=True, weights_only=True)
    except (
        RuntimeError,
        OSError,
        EOFError,
        ValueError,
        KeyError,
        UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        raise InputError(
            f"'{state}' cannot be read ({first_line(error)}); remove it to begin with the first epoch again."
        ) from error
    if not isinstance(written, dict) or not {"state_dict", "loops", "epoch"} <= written.keys():
        raise foreign_state(state)
    done, epochs = written["epoch"] + 1, settings.recipe.recipe.epochs
    if done > epochs:
        raise InputError(
            f"The run of '{settings.output}' has {done} epochs already and cannot end with {epochs}; give "
            f"epochs={done} or more, or start a new run."
        )
    if not (settings.output / settings.best).is_file():
        raise InputError(
            f"'{settings.output / settings.best}', the best network so far, is gone; put it back, or remove '{STATE}' "
            "to begin with the first epoch again."
        )
    return str(state)


def foreign_state(state: Path) -> InputError:
    """What is said of a state that does not fit the run in whose folder it lies."""
    return InputError(
        f"'{state}' is not the state of this run, or '{RUN}' was edited; put them back, or remove '{state.name}' to "
        "begin with the first epoch again."
    )
