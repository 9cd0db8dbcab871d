"""Fold timm models of every family and write what happened as a table.

    python benchmarks/fold_models.py --output docs/folding-models.md --json fold_models.jsonl

Each model is built without pretrained weights, its batch norms get random scales and statistics, and it is folded at
its default input size with the proof on. Each runs in a worker process with a time limit, so that one that fails
or takes too long costs one row. The JSON file has one line a model; models that it already has are not run again.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

# By purpose: networks that were made to be folded, then one or more of every timm family with batch norms, then some
# that have none. A number is an input size where the default one would take minutes.
MODELS: dict[str, dict[str, int | None]] = {
    "Made to be folded": {
        "repvgg_a0": None,
        "repvgg_b1g4": None,
        "repvgg_d2se": 224,
        "mobileone_s0": None,
        "mobileone_s1": None,
        "mobileone_s4": None,
        "repghostnet_050": None,
        "repghostnet_100": None,
        "repghostnet_200": None,
        "ghostnetv3_050": None,
        "ghostnetv3_100": None,
        "fastvit_t8": None,
        "fastvit_sa12": None,
        "fastvit_mci0": None,
        "repvit_m0_9": None,
        "repvit_m1_1": None,
        "levit_128s": None,
        "levit_conv_128": None,
        "efficientvit_m0": None,
        "shvit_s1": None,
        "starnet_s1": None,
        "swiftformer_xs": None,
    },
    "Other convolutional networks": {
        "convmixer_768_32": 112,
        "cs3darknet_s": None,
        "cspnext_tiny": None,
        "cspresnet50": None,
        "densenet121": None,
        "dla34": None,
        "dla60_res2net": None,
        "dpn68": None,
        "ecaresnet26t": None,
        "efficientnet_b0": None,
        "efficientnet_es": None,
        "ese_vovnet19b_dw": None,
        "fasternet_t0": None,
        "fbnetc_100": None,
        "fbnetv3_b": None,
        "gernet_s": None,
        "ghostnet_100": None,
        "ghostnetv2_100": None,
        "hardcorenas_a": None,
        "hgnetv2_b0": None,
        "hrnet_w18": None,
        "inception_resnet_v2": None,
        "inception_v3": None,
        "inception_v4": None,
        "lcnet_050": None,
        "lcnetv2_small": None,
        "legacy_seresnet18": None,
        "legacy_xception": None,
        "mixnet_s": None,
        "mnasnet_100": None,
        "mobilenetv2_100": None,
        "mobilenetv3_large_100": None,
        "mobilenetv4_conv_small": None,
        "nasnetalarge": 224,
        "pnasnet5large": 224,
        "regnetx_032": None,
        "regnety_008": None,
        "regnetz_b16": None,
        "res2net50_26w_4s": None,
        "resnest14d": None,
        "resnet18": None,
        "resnet50": None,
        "resnetblur50": None,
        "resnetv2_50": None,
        "resnext50_32x4d": None,
        "rexnet_100": None,
        "selecsls42b": None,
        "skresnet18": None,
        "tf_efficientnet_lite0": None,
        "tf_mixnet_s": None,
        "tinynet_a": None,
        "tresnet_m": None,
        "vgg16_bn": None,
        "xception41": None,
        "xception41p": None,
    },
    "Convolutions and attention": {
        "botnet26t_256": None,
        "coat_tiny": None,
        "coatnet_nano_rw_224": None,
        "edgenext_small": None,
        "efficientformer_l1": None,
        "efficientformerv2_s0": None,
        "efficientvit_b0": None,
        "halonet26t": None,
        "lambda_resnet26t": None,
        "maxvit_nano_rw_256": None,
        "mobilenetv4_hybrid_medium": None,
        "mobilevit_s": None,
        "mobilevitv2_050": None,
        "nextvit_small": None,
        "tiny_vit_5m_224": None,
        "visformer_tiny": None,
        "vit_small_resnet26d_224": None,
        "xcit_nano_12_p16_224": None,
    },
    "Without batch norms": {
        "convnext_tiny": None,
        "dm_nfnet_f0": None,
        "inception_next_tiny": None,
        "mambaout_femto": None,
        "poolformer_s12": None,
        "resnetv2_50d_gn": None,
        "swin_tiny_patch4_window7_224": None,
        "vit_small_patch16_224": None,
    },
}
_DISTRIBUTIONS = ("refold", "torch", "timm")
_SHOWN_REASONS = 3


def fold_one(name: str) -> dict[str, Any]:
    """Fold one model in this process: the facts of its row."""
    import timm
    import torch

    import refold

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    draw_batch_norms(model)
    size = input_size(name, model)
    generator = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    folded = refold.fold(model, torch.randn(1, *size, generator=generator))
    seconds = time.perf_counter() - start
    report = folded.fold_report.to_dict()  # type: ignore[union-attr, operator]
    return {"size": size, "seconds": seconds, "regions": len(report.pop("regions")), **report}


def draw_batch_norms(model: Any) -> None:
    """Give every batch norm random statistics, scales and shifts.

    The scales are around a half: with larger ones deep networks of random weights amplify rounding as no trained
    network does.
    """
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for norm in (module for module in model.modules() if isinstance(module, _BatchNorm)):
            shape = norm.running_var.shape
            norm.running_mean.copy_(torch.randn(shape, generator=generator) * 0.1)
            norm.running_var.copy_(torch.rand(shape, generator=generator) + 0.5)
            if norm.affine:
                norm.weight.copy_(torch.rand(shape, generator=generator) / 2 + 0.25)
                norm.bias.copy_(torch.randn(shape, generator=generator) * 0.1)


def input_size(name: str, model: Any) -> list[int]:
    """`[channels, height, width]`: the default of the model, or the smaller one of the list."""
    channels, height, width = model.pretrained_cfg["input_size"]
    smaller = next((models[name] for models in MODELS.values() if name in models), None)
    return [channels, smaller or height, smaller or width]


def run(name: str, limit: float, script: str = __file__) -> dict[str, Any]:
    """Run the script for one model in a worker process; the record says why there is no row where it failed."""
    command = [sys.executable, script, "--one", name]
    with tempfile.TemporaryFile("w+") as errors:
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return {"name": name, "failed": f"took more than {limit:g} s"}
        if done.returncode == 0:
            return {"name": name, **json.loads(done.stdout.splitlines()[-1])}
        errors.seek(0)
        last = [line for line in errors.read().splitlines() if line.strip()][-1:]
        return {"name": name, "failed": last[0] if last else f"ended with exit code {done.returncode}"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="the Markdown file to write")
    parser.add_argument("--json", type=Path, default=Path("fold_models.jsonl"), help="one line a model")
    parser.add_argument("--models", nargs="+", help="timm names; all of the list if not given")
    parser.add_argument("--limit", type=float, default=600, help="seconds for one model")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(fold_one(options.one)))
        return
    names = options.models or [name for models in MODELS.values() for name in models]
    records = read_records(options.json)
    for number, name in enumerate(names, start=1):
        if name in records:
            continue
        record = run(name, options.limit)
        records[name] = record
        with options.json.open("a") as file:
            file.write(json.dumps(record) + "\n")
        outcome = record.get("failed") or f"{record['regions']} regions, {record['seconds']:.1f} s"
        print(f"{number}/{len(names)} {name}: {outcome}", flush=True)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(page([records[name] for name in names]))
        print(f"wrote {options.output}")


def read_records(path: Path) -> dict[str, dict[str, Any]]:
    """The records of an earlier run, the last one of each model."""
    if not path.is_file():
        return {}
    return {record["name"]: record for record in map(json.loads, path.read_text().splitlines())}


def page(records: Sequence[dict[str, Any]]) -> str:
    """The whole document."""
    folded = [record for record in records if "failed" not in record]
    sections = [
        "# Folding timm's models\n",
        _introduction(records, folded),
        *(_section(title, records) for title in [*MODELS, None]),
        _reasons(folded),
        _notes(records),
    ]
    return "\n".join(section for section in sections if section)


def _introduction(records: Sequence[dict[str, Any]], folded: Sequence[dict[str, Any]]) -> str:
    before, after = (
        sum(r[when]["operators"].get("batch norm", 0) for r in folded) for when in ("before", "after")
    )
    clean = [r for r in folded if not r["after"]["operators"].get("batch norm", 0)]
    worst = max((r["proof"]["distance_float64"] for r in folded), default=0.0)
    return f"""\
Written by `python benchmarks/fold_models.py --output docs/folding-models.md`: {len(records)} models in training
form with random weights and batch norm statistics, folded by `refold.fold` on one image of the given size, with the
proof, on one thread.
{versions()}, {cpu_name()}.

{len(folded)} of {len(records)} models were folded and proved. Of {before:,} batch norms that ran before, {after:,} run
after, and {len(clean)} models have none left; [why the others stay](#what-was-left-and-why). The largest distance of
any model from its folded form is {worst:.0e}.

- *parts left*: modules whose code looks at the values of tensors or has hooks, so that nothing is folded across it;
  everything inside them was folded by itself. "whole" is none.
- *regions*: how many linear parts became one layer each.
- *convolutions*, *batch norms*, *operators*: how many run in one forward pass, before → after.
- *|Δ| float64*: the largest difference of any output, relative to the largest output, both networks computed in
  float64, on two image sizes where the network takes them.
- *float32*: the distance (relative, root mean square) from the float64 result, before → after.
- *seconds*: folding and proof.
"""


def versions() -> str:
    """What the figures were taken with."""
    installed = ", ".join(f"{name} {version(name)}" for name in _DISTRIBUTIONS)
    return f"{installed}, Python {platform.python_version()}"


def cpu_name() -> str:
    """The processor, as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


_COLUMNS = ("model", "size", "parts left", "regions", "convolutions", "batch norms", "operators")
_MEASURES = ("\\|Δ\\| float64", "float32", "seconds")


def _section(title: str | None, records: Sequence[dict[str, Any]]) -> str:
    """The table of one group of the list; the models of no group if there is no title."""
    grouped = {name for models in MODELS.values() for name in models}
    rows = [r for r in records if (r["name"] in MODELS[title] if title else r["name"] not in grouped)]
    if not rows:
        return ""
    columns = [*_COLUMNS, *_MEASURES]
    lines = [
        f"## {title or 'More'}\n",
        f"| {' | '.join(columns)} |",
        f"|{'|'.join(['---', *['--:'] * (len(columns) - 1)])}|",
        *(_row(record, len(columns)) for record in rows),
    ]
    return "\n".join(lines) + "\n"


def _row(record: dict[str, Any], columns: int) -> str:
    if "failed" in record:
        cells = [f"`{record['name']}`", "failed", *[""] * (columns - 2)]
        return f"| {' | '.join(cells)} |"
    proof, parts = record["proof"], len(guarded(record))
    cells = [
        f"`{record['name']}`",
        "×".join(map(str, record["size"][1:])),
        str(parts) if parts else "whole",
        str(record["regions"]),
        _change(*(record[when]["operators"].get("convolution", 0) for when in ("before", "after"))),
        _change(*(record[when]["operators"].get("batch norm", 0) for when in ("before", "after"))),
        _change(*(sum(record[when]["operators"].values()) for when in ("before", "after"))),
        f"{proof['distance_float64']:.0e}",
        f"{proof['original_distance']:.1e} → {proof['folded_distance']:.1e}",
        f"{record['seconds']:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def _change(before: int, after: int) -> str:
    return f"{before} → {after}" if before != after else str(before)


def guarded(record: dict[str, Any]) -> list[dict[str, str]]:
    """The parts of one model across whose code nothing was folded."""
    marks = ("looks at the values", "it is compiled (TorchScript)", "it has hooks")
    return [item for item in record["left"] if any(mark in item["reason"] for mark in marks)]


def _reasons(folded: Iterable[dict[str, Any]]) -> str:
    lines = ["## What was left, and why\n", "| model | how many | first of them | why |", "|---|--:|---|---|"]
    for record in folded:
        counts = Counter(item["reason"] for item in record["left"])
        for reason, count in counts.most_common(_SHOWN_REASONS):
            first = next(item["name"] for item in record["left"] if item["reason"] == reason)
            lines.append(f"| `{record['name']}` | {count} | `{first}` | {_escaped(reason)} |")
        others = counts.most_common()[_SHOWN_REASONS:]
        if others:
            total = sum(count for _, count in others)
            lines.append(f"| `{record['name']}` | {total} | | {len(others)} other reasons |")
    return "\n".join(lines) + "\n"


def _notes(records: Iterable[dict[str, Any]]) -> str:
    lines = [
        *(f"- `{record['name']}` failed: {record['failed']}" for record in records if "failed" in record),
        *(f"- `{record['name']}`: {note}" for record in records for note in record.get("notes", ())),
    ]
    return "\n".join(["## Notes\n", *lines]) + "\n" if lines else ""


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    main()
