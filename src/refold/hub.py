"""Networks on the Hugging Face hub: a file of `refold.save` with its model card, by name and by the usual code."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from refold.cards import Card
from refold.checkpoints import read_card
from refold.errors import CheckpointError, InputError, first_line
from refold.files import PathLike

_WEIGHTS, _MODEL_CARD = "model.safetensors", "README.md"


def push(
    path: PathLike, repository: str, *, private: bool = False, message: str = "Add a network of refold"
) -> str:
    """Publish a checkpoint of `refold.save` as ``owner/name``, with the model card beside it, and return its address.

    A model card is taken from the ``README.md`` in the folder of a run; without one, one is written of what the
    checkpoint says. The account is that of ``huggingface-cli login`` or ``HF_TOKEN``.
    Raises `CheckpointError` where the file is none of refold's, and `InputError` where the hub refuses.
    """
    from huggingface_hub import HfApi

    source = Path(path)
    card = read_card(source)
    if card is None:
        raise CheckpointError(f"'{source}' was not written by refold.save; save the network with it first.")
    if repository.count("/") != 1:
        raise InputError(f"The repository is '{repository}'; give owner/name.")
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(source, Path(folder) / _WEIGHTS)
        beside = source.with_name(_MODEL_CARD)
        text = beside.read_text(encoding="utf-8") if beside.is_file() else _model_card(card, repository)
        (Path(folder) / _MODEL_CARD).write_text(text, encoding="utf-8")
        try:
            hub: Any = HfApi()
            address = hub.create_repo(repository, private=private, exist_ok=True)
            hub.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
        except Exception as error:  # whatever the network and the hub raise
            raise InputError(
                f"'{repository}' cannot be published ({first_line(error)}); log in, or check the name."
            ) from error
    return str(address)


def _model_card(card: Card, repository: str) -> str:
    classes = f"\n\nClasses: {', '.join(card.class_names)}." if card.class_names else ""
    return (
        "---\nlibrary_name: refold\npipeline_tag: image-classification\n---\n\n"
        f"# {card.title}\n\n{card.title} in {card.form} form, written by refold {card.refold_version}.{classes}\n\n"
        f'```python\nimport refold\n\nnet = refold.load("hf-hub:{repository}")\n```\n'
    )
