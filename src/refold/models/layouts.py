"""The names that checkpoints give to a network's weights, and how they become refold's."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class CheckpointLayout:
    """A way of naming a network's weights, as the substitutions that turn its names into refold's.

    ``renames`` are pairs of a regular expression and its replacement, applied to each name one after the
    other. ``unused`` is a pair of patterns: where a weight fits the second, those that fit the first are left
    out, because the official network holds but does not read them.
    """

    name: str
    renames: tuple[tuple[str, str], ...] = ()
    unused: tuple[str, str] | None = None

    def rename(self, key: str) -> str:
        """The refold name of one weight; a name that no pattern fits comes back as it is."""
        for pattern, replacement in self.renames:
            key = re.sub(pattern, replacement, key)
        return key

    def rename_all(self, keys: Iterable[str]) -> dict[str, str]:
        """The refold names of all weights but the unused ones, each with the name it came from."""
        keys = list(keys)
        if self.unused is not None:
            unused, beside = self.unused
            if any(re.search(beside, key) for key in keys):
                keys = [key for key in keys if not re.search(unused, key)]
        return {self.rename(key): key for key in keys}


OWN_LAYOUT = CheckpointLayout("refold")


def recognise(
    keys: Iterable[str], layouts: Collection[CheckpointLayout], own_keys: Collection[str]
) -> CheckpointLayout:
    """The layout whose refold names meet the most of the network's ``own_keys``.

    In a draw it is the one that renames the most keys: a checkpoint in plain form meets few names, or
    none, of a network in training form.
    """
    keys = list(keys)
    return max((OWN_LAYOUT, *layouts), key=lambda layout: _score(layout, keys, own_keys))


def names_met(keys: Iterable[str], layouts: Collection[CheckpointLayout], own_keys: Collection[str]) -> int:
    """How many of the network's ``own_keys`` the names meet in the layout that meets the most."""
    keys = list(keys)
    return max(_score(layout, keys, own_keys)[0] for layout in (OWN_LAYOUT, *layouts))


def _score(layout: CheckpointLayout, keys: list[str], own_keys: Collection[str]) -> tuple[int, int]:
    renamed = [layout.rename(key) for key in keys]
    met = sum(key in own_keys for key in renamed)
    return met, sum(new != old for new, old in zip(renamed, keys, strict=True))
