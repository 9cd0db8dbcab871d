"""Unfold models of timm and torchvision, train two steps, and take them back to their own class, as a table.

    python benchmarks/unfold_models.py --output docs/unfolded-models.md --json unfold_models.jsonl

Each model is built in float64 without pretrained weights, its batch norms get random scales and statistics, and it is
unfolded and trained for two steps. Its state dict of the original class is loaded strictly into a new model, and the
folded network is compared too. Each runs in a worker process with a time limit. The JSON file has one line a
model; models that it already has are not run again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fold_models import cpu_name, draw_batch_norms, read_records, run, versions

# By family, the plan, and the models; "torchvision/" says whose model it is.
MODELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "ResNets": (
        "mobileone",
        (
            "resnet18",
            "resnet26d",
            "resnet50",
            "resnext50_32x4d",
            "seresnext26d_32x4d",
            "ecaresnet26t",
            "skresnet18",
            "res2net50_26w_4s",
            "resnetblur50",
            "resnetv2_50",
            "gernet_s",
            "torchvision/resnet18",
        ),
    ),
    "MobileNets": (
        "ghostnetv3",
        (
            "mobilenetv1_100",
            "mobilenetv2_100",
            "torchvision/mobilenet_v2",
            "mobilenetv3_small_100",
            "mobilenetv3_large_100",
            "tf_mobilenetv3_small_100",
            "torchvision/mobilenet_v3_small",
            "mobilenetv4_conv_small",
            "mobilenetv4_conv_medium",
            "mobilenetv4_hybrid_medium",
            "lcnet_050",
            "mnasnet_100",
            "fbnetc_100",
            "hardcorenas_a",
            "mixnet_s",
            "tf_mixnet_s",
        ),
    ),
    "EfficientNets": (
        "ghostnetv3",
        (
            "efficientnet_b0",
            "efficientnet_lite0",
            "tf_efficientnet_lite0",
            "tf_efficientnetv2_b0",
            "efficientnet_es",
            "tinynet_a",
            "efficientnetv2_rw_t",
            "torchvision/efficientnet_b0",
        ),
    ),
    "RegNets": ("mobileone", ("regnetx_002", "regnety_002", "regnetz_b16", "torchvision/regnet_y_400mf")),
    "ShuffleNets and their like": (
        "ghostnetv3",
        (
            "torchvision/shufflenet_v2_x0_5",
            "torchvision/shufflenet_v2_x1_0",
            "ghostnet_100",
            "ghostnetv2_100",
            "starnet_s1",
            "rexnet_100",
        ),
    ),
    "ConvNeXts": ("acb", ("convnext_atto", "convnextv2_atto", "inception_next_atto")),
    "Dense connections": ("mobileone", ("densenet121", "torchvision/densenet121", "dla34", "dpn68")),
    "Convolutions and attention": (
        "ghostnetv3",
        (
            "mobilevit_xs",
            "mobilevitv2_050",
            "edgenext_small",
            "efficientformer_l1",
            "efficientvit_b0",
            "coatnet_nano_rw_224",
        ),
    ),
    "Other convolutional networks": (
        "dbb",
        (
            "vgg11_bn",
            "inception_v3",
            "xception41",
            "cspresnet50",
            "hgnetv2_b0",
            "selecsls42b",
            "ese_vovnet19b_dw",
            "fasternet_t0",
            "torchvision/googlenet",
        ),
    ),
    "Networks that have branches": (
        "acb",
        ("repvgg_a0", "mobileone_s0", "repghostnet_050", "fastvit_t8", "repvit_m0_9"),
    ),
}
_LARGEST = 96
_TOLERANCE = 1e-9


def unfold_one(name: str) -> dict[str, Any]:
    """Unfold, train, fold and return one model in this process: the facts of its row."""
    import torch
    from torch import nn

    import refold

    torch.set_num_threads(1)
    plan = next(plan for plan, names in MODELS.values() if name in names)
    start = time.perf_counter()
    model = _build(name, 0).double().eval()
    draw_batch_norms(model)
    size = _size(name, model)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *size, generator=generator, dtype=torch.float64)
    wide: Any = refold.unfold(model, plan, example_input=x[:1])
    with torch.no_grad():
        preserved = _distance(model(x), wide(x))
    wide.train()
    optimizer = torch.optim.SGD(wide.parameters(), 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        out = wide(x)
        out = out[0] if isinstance(out, tuple) else out
        out.square().mean().backward()
        optimizer.step()
    wide.eval()
    back = _build(name, 1).double().eval()
    back.load_state_dict(refold.original_state_dict(wide), strict=True)
    folded: Any = refold.fold(wide, x[:1], prove=False)
    with torch.no_grad():
        expected = wide(x)
        returned, plain = _distance(expected, back(x)), _distance(expected, folded(x))
        moved = _distance(expected, model(x))
    from_fold = ""
    try:
        back.load_state_dict(refold.original_state_dict(folded), strict=True)
        with torch.no_grad():
            plain = max(plain, _distance(expected, back(x)))
    except refold.InputError as error:
        from_fold = str(error)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    kinds: dict[str, int] = {}
    for layer in wide.unfold_report.layers:
        kinds[layer.kind] = kinds.get(layer.kind, 0) + 1
    parameters = [sum(p.numel() for p in net.parameters()) for net in (model, wide)]
    failed = [
        f"{what}: {distance:.1e}"
        for what, distance in (("unfolding", preserved), ("return", returned), ("folding", plain))
        if not distance <= _TOLERANCE
    ]
    if failed:
        raise AssertionError(f"{name} computes something else after {', '.join(failed)}")
    return {
        "plan": plan,
        "size": size,
        "kinds": kinds,
        "convolutions": convolutions,
        "parameters": parameters,
        "preserved": preserved,
        "moved": moved,
        "returned": returned,
        "folded": plain,
        "from_fold": from_fold,
        "seconds": time.perf_counter() - start,
    }


def _build(name: str, seed: int) -> Any:
    import timm
    import torch
    import torchvision

    torch.manual_seed(seed)
    library, _, short = name.rpartition("/")
    if not library:
        return timm.create_model(name)
    settings = {"init_weights": False} if short == "googlenet" else {}
    return torchvision.models.get_model(short, weights=None, **settings)


def _size(name: str, model: Any) -> list[int]:
    """`[channels, height, width]`, at most 96 pixels where the model takes any size."""
    cfg = getattr(model, "pretrained_cfg", {})
    side = cfg.get("input_size", (3, 224, 224))[1]
    return [3, *[side if cfg.get("fixed_input_size") or name in _OWN_SIZE else _LARGEST] * 2]


# Their layers need maps that are larger, or of one size.
_OWN_SIZE = {"coatnet_nano_rw_224", "efficientformer_l1", "inception_v3"}


def _distance(expected: Any, found: Any) -> float:
    """Largest difference of the outputs, relative to the largest output."""
    return float((found - expected).abs().max() / expected.abs().max())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="the Markdown file to write")
    parser.add_argument("--json", type=Path, default=Path("unfold_models.jsonl"), help="one line a model")
    parser.add_argument("--models", nargs="+", help="names of the list; all of it if not given")
    parser.add_argument("--limit", type=float, default=600, help="seconds for one model")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(unfold_one(options.one)))
        return
    names = options.models or [name for _, models in MODELS.values() for name in models]
    records = read_records(options.json)
    for number, name in enumerate(names, start=1):
        if name in records:
            continue
        record = run(name, options.limit, __file__)
        records[name] = record
        with options.json.open("a") as file:
            file.write(json.dumps(record) + "\n")
        outcome = record.get("failed") or f"{sum(record['kinds'].values())} layers, {record['seconds']:.1f} s"
        print(f"{number}/{len(names)} {name}: {outcome}", flush=True)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(page([records[name] for name in names]))
        print(f"wrote {options.output}")


def page(records: Sequence[dict[str, Any]]) -> str:
    """The whole document."""
    good = [record for record in records if "failed" not in record]
    whole = [record for record in good if not record["from_fold"]]
    listed = sum(len(names) for _, names in MODELS.values())
    worst = max((max(r["preserved"], r["returned"], r["folded"]) for r in good), default=0.0)
    lines = [
        "# Unfolding models of timm and torchvision\n",
        f"""\
Written by `python benchmarks/unfold_models.py --output docs/unfolded-models.md`: {len(records)} of the {listed} models
of its list, with random weights and batch norm statistics, in float64, unfolded by `refold.unfold`, trained for two
steps on two images, and taken back to their own class by `refold.original_state_dict` and
`load_state_dict(strict=True)`.
{versions()}, {cpu_name()}.

{len(good)} of {len(records)} models compute the same when they are unfolded, when they are back in their class, and
when they are folded; the largest distance is {worst:.0e}. Of {len(whole)} models, the folded network gives the state
dict of the original class too; of the others only the unfolded network does, because folding merges more than branches.

- *layers*: how many of the model's 2-d convolutions got branches, of how many; p pointwise, d depthwise, n dense,
  g grouped.
- *parameters*: in millions, of the model → of the unfolded model.
- *unfolded*, *returned*, *folded*: largest difference of any output, relative to the largest: of the unfolded model
  from the model before training; of the model of the original class from the unfolded one after training; of the folded
  network. *trained*: how far the training moved the outputs.
- *from the fold*: whether the folded network gives the original state dict too.
""",
    ]
    for title, (plan, names) in MODELS.items():
        rows = [record for record in records if record["name"] in names]
        if rows:
            lines += [f"## {title}: `{plan}`\n", _HEAD, *map(_row, rows), ""]
    failed = [f"- `{record['name']}` failed: {record['failed']}" for record in records if "failed" in record]
    return "\n".join([*lines, *(["## Notes\n", *failed, ""] if failed else [])])


_COLUMNS = (
    "model",
    "size",
    "layers",
    "parameters",
    "unfolded",
    "trained",
    "returned",
    "folded",
    "from the fold",
)
_HEAD = f"| {' | '.join(_COLUMNS)} |\n|---{'|--:' * (len(_COLUMNS) - 1)}|"
_LETTERS = {"pointwise": "p", "depthwise": "d", "dense": "n", "grouped": "g"}


def _row(record: dict[str, Any]) -> str:
    name = f"`{record['name']}`"
    if "failed" in record:
        return f"| {name} | failed {'| ' * (len(_COLUMNS) - 2)}|"
    counted = " ".join(
        f"{number}{_LETTERS[kind]}" for kind, number in sorted(record["kinds"].items(), reverse=True)
    )
    before, after = (number / 1e6 for number in record["parameters"])
    cells = [
        name,
        "×".join(map(str, record["size"][1:])),
        f"{sum(record['kinds'].values())} of {record['convolutions']} ({counted})",
        f"{before:.1f} → {after:.1f}",
        f"{record['preserved']:.0e}",
        f"{record['moved']:.0e}",
        f"{record['returned']:.0e}",
        f"{record['folded']:.0e}",
        "no" if record["from_fold"] else "yes",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
