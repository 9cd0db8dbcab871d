"""The names that checkpoints give to a network's weights, and how they become refold's."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """A way of naming a network's weights, as the substitutions that turn its names into refold's.

    ``renames`` are pairs of a regular expression and its replacement, applied to each name one after the
    other.
    """

    name: str
    renames: tuple[tuple[str, str], ...] = ()

    def rename(self, key: str) -> str:
        """The refold name of one weight; a name that no pattern fits comes back as it is."""
        for pattern, replacement in self.renames:
            key = re.sub(pattern, replacement, key)
        return key


OWN_LAYOUT = Layout("refold")


def recognise(keys: Iterable[str], layouts: Collection[Layout], own_keys: Collection[str]) -> Layout:
    """The layout whose refold names meet the most of the network's ``own_keys``; refold's wins a draw."""
    keys = list(keys)
    return max((OWN_LAYOUT, *layouts), key=lambda layout: sum(layout.rename(key) in own_keys for key in keys))
