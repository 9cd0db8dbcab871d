"""The folder that a training run writes: its files by name, and the network that it says it trains."""

from __future__ import annotations

import json
from pathlib import Path

from refold.cards import is_recordable
from refold.errors import CheckpointError

STATE, TRAINING, PLAIN, RUN = "last.ckpt", "training.safetensors", "plain.safetensors", "run.json"


def network_of_run(folder: Path) -> str | None:
    """The name of the network that a run trains; None where its ``run.json`` is missing or names none of a registry.

    Raises `CheckpointError` where the run gives the network branches, which its name does not tell.
    """
    try:
        written = json.loads((folder / RUN).read_text(encoding="utf-8"))
        name, plan = written["network"], written.get("unfold")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    if not isinstance(name, str) or not is_recordable({"name": name, "arguments": {}}):
        return None
    if plan is not None:
        raise CheckpointError(
            f"'{folder / STATE}' holds {name} with the branches of a plan, which {TRAINING} beside it would describe; "
            "put that file back, or resume the run."
        )
    return name
