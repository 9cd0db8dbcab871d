"""The model card of a run, as Hugging Face shows it: what the card's data say, as one page of Markdown."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import yaml

from refold.errors import printable
from refold.export.metadata import port_names
from refold.templates import template
from refold.training.settings import (
    CARD,
    CURVES,
    HISTORY,
    INT8,
    MODEL_CARD,
    ONNX,
    PICTURE,
    PLAIN,
    REPORT,
    TRAINING,
)

_FILES = {
    MODEL_CARD: "this page",
    TRAINING: "the network in training form, for `refold.load` and for training on",
    PLAIN: "the plain form, for `refold.load`, `refold predict` and `refold export`",
    INT8: "the int8 file for ONNX Runtime",
    ONNX: "the plain form for ONNX Runtime, and for whatever else reads ONNX",
    REPORT: "what was folded, and the proof",
    PICTURE: "what was folded, drawn",
    CARD: "the facts of this page as data",
    HISTORY: "losses, accuracies and learning rate of each epoch",
    CURVES: "the same, drawn",
}


class _Kind(NamedTuple):
    """What a card says of a task: its page, and its names on the hub."""

    template: str
    pipeline: str
    metric: str


_KINDS = {
    "classify": _Kind("model_card.md.jinja", "image-classification", "accuracy"),
    "detect": _Kind("detection_card.md.jinja", "object-detection", "mean_average_precision"),
    "instances": _Kind("instances_card.md.jinja", "image-segmentation", "mean_average_precision"),
    "segment": _Kind("segmentation_card.md.jinja", "image-segmentation", "mean_iou"),
}
_ORIGINS = {"checkpoint": "started from", "teacher": "teacher"}


def model_card(card: Mapping[str, Any]) -> str:
    """The page for the ``card.json`` of a run, from nothing but that."""
    card = {**card, "result": {"int8": None, **card["result"]}}  # runs of earlier versions have none
    filters: dict[str, Callable[..., Any]] = {
        "markdown": _markdown,
        "number": "{:.6g}".format,
        "tojson_ascii": json.dumps,
    }
    preprocessing, settings = card["preprocessing"], card["settings"]
    _, height, width = preprocessing["input_size"]
    (image,), (output,) = port_names("image", 1), port_names("output", 1)
    return template("refold.training", _KINDS[card["task"]].template, filters).render(
        card,
        front=_front_matter(card),
        height=height,
        width=width,
        resized=math.floor(min(height, width) / preprocessing["crop_pct"]),
        image=image,
        output=output,
        origins=[(title, settings[key]) for key, title in _ORIGINS.items() if settings.get(key)],
        files=_FILES,
        plain=PLAIN,
        onnx=INT8 if card["result"]["int8"] else ONNX,
    )


def _front_matter(card: Mapping[str, Any]) -> str:
    network, data, result = card["settings"]["network"], card["data"]["title"], card["result"]
    kind = _KINDS[card["task"]]
    score = {
        "type": kind.metric,
        "name": f"held-out {result['score']}, {'int8' if result['int8'] else 'plain form'}",
        "value": result["onnx_score" if result["int8"] else "plain_score"],
    }
    measured = {
        "task": {"type": kind.pipeline},
        "dataset": {"type": "imagefolder", "name": data},
        "metrics": [score],
    }
    front = {
        "library_name": "refold",
        "pipeline_tag": kind.pipeline,
        "tags": [kind.pipeline, "refold", "onnx"],
        "metrics": [kind.metric],
        "model-index": [{"name": network, "results": [measured]}],
    }
    text: str = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    return text


def _markdown(text: object) -> str:
    """A text that shows as it is, in a table as well."""
    return re.sub(r"([\\`*_{}\[\]<>#|~!&$])", r"\\\1", printable(text))
