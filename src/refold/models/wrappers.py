"""Where training scripts put a network's weights in a checkpoint, and what they put before the weights' names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from refold.errors import some

# Averaged weights come first: they are the ones meant for use.
_AVERAGED = (
    "state_dict_ema", "ema_state_dict", "model_ema", "ema_model", "ema", "params_ema", "shadow",
    "averaged_model", "swa_model",
)  # fmt: skip
_TRAINED = (
    "state_dict", "model_state_dict", "model", "net", "network", "module", "student", "backbone", "encoder",
    "params", "weights",
)  # fmt: skip
_AVERAGED_PREFIXES = {"average.", "ema_model.", "model_ema.", "ema.", "averaged_model.", "swa_model."}
_PREFIXES = {
    "model.", "net.", "module.", "backbone.", "encoder.", "_orig_mod.", "student.", "network.",
}  # fmt: skip
_DEEPEST = 6


@dataclass(frozen=True)
class Found:
    """The weights at one place of a checkpoint, by name, and how they were taken out of it.

    ``notes`` says, a fact each, which of several were chosen, what was stripped from their names and what was left out.
    """

    weights: dict[str, Tensor]
    place: tuple[str, ...] = ()
    chain: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def is_averaged(self) -> bool:
        return bool(_AVERAGED_PREFIXES & set(self.chain)) or bool(set(_AVERAGED) & set(self.place))

    @property
    def notes(self) -> tuple[str, ...]:
        said = []
        if self.place:
            said.append(f"took the weights in '{'.'.join(self.place)}'")
        if self.chain:
            said.append(f"stripped '{''.join(self.chain)}' from their names")
        if said and self.is_averaged:
            said[-1] += ", which are averaged"
        if self.left_out:
            others = "other" if len(self.left_out) == 1 else "others"
            said.append(f"left out {len(self.left_out)} {others} ({some(_heads(self.left_out))})")
        return tuple(said)


def weights_in(checkpoint: Mapping[Any, Any] | nn.Module) -> list[Found]:
    """The weights at each place of a checkpoint that training scripts use, the likeliest first."""
    return list(_weights_in(checkpoint, (), set()))


def _weights_in(
    checkpoint: Mapping[Any, Any] | nn.Module, place: tuple[str, ...], seen: set[int]
) -> Iterator[Found]:
    if isinstance(checkpoint, nn.Module):
        checkpoint = checkpoint.state_dict()
    seen.add(id(checkpoint))  # a file may hold one dictionary at many places, itself among them
    if len(place) < _DEEPEST:
        for name in (*_AVERAGED, *_TRAINED):
            inner = checkpoint.get(name)
            if isinstance(inner, Mapping | nn.Module) and id(inner) not in seen:
                yield from _weights_in(inner, (*place, name), seen)
    weights = {key: _tensor(value) for key, value in checkpoint.items() if isinstance(key, str)}
    held = {key: value for key, value in weights.items() if value is not None}
    if held:
        yield Found(held, place)


def best(places: Collection[Found], fit: Callable[[Collection[str]], int]) -> Found:
    """Of all places, and all known prefixes of the names there, the one whose weights ``fit`` the most names.

    Of equals it is the averaged one, and then the one whose names are stripped the least.
    """
    tried = [_stripped(place, chain) for place in places for chain in _chains(place.weights)]
    scores = [(fit(found.weights), found.is_averaged, -len(found.chain)) for found in tried]
    chosen = tried[scores.index(max(scores))]
    if not chosen.chain:
        return chosen
    # What stands beside the network may still be a part of it, such as a classifier behind a backbone.
    beside = next(place for place in places if place.place == chosen.place).weights
    fitting = [key for key in chosen.left_out if key not in chosen.weights and fit([key])]
    return Found(
        {**chosen.weights, **{key: beside[key] for key in fitting}},
        chosen.place,
        chosen.chain,
        tuple(key for key in chosen.left_out if key not in fitting),
    )


def _tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        return torch.from_numpy(value)
    return None


def _chains(keys: Collection[str]) -> list[tuple[str, ...]]:
    """Every chain of known prefixes that names begin with, the shortest first."""
    found: list[tuple[str, ...]] = [()]
    for chain in found:  # grows as it is read
        if len(chain) < _DEEPEST:
            start = "".join(chain)
            heads = {key[len(start) :].partition(".")[0] + "." for key in keys if key.startswith(start)}
            found += [(*chain, head) for head in sorted(heads & (_PREFIXES | _AVERAGED_PREFIXES))]
    return found


def _stripped(found: Found, chain: tuple[str, ...]) -> Found:
    start = "".join(chain)
    weights = {key[len(start) :]: value for key, value in found.weights.items() if key.startswith(start)}
    left_out = tuple(key for key in found.weights if not key.startswith(start))
    return Found(weights, found.place, chain, left_out)


def _heads(keys: Collection[str]) -> list[str]:
    """The names, where many begin with one prefix that alone."""
    heads = (key.partition(".")[0] + "." for key in keys)
    known = _PREFIXES | _AVERAGED_PREFIXES
    return list(dict.fromkeys(head if head in known else key for head, key in zip(heads, keys, strict=True)))
