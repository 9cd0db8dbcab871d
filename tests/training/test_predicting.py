"""Predictions by name, the same from every form, and images that cannot be read."""

import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import Result
from PIL import Image
from timm.data import create_transform
from torch import nn
from typer.testing import CliRunner

import refold
from refold.cli import app
from refold.errors import InputError, RefoldError
from refold.export import FORMATS, installed_engines
from refold.training.exported import exported_classifier
from refold.training.pictures import LeftOut, find_images
from refold.training.predicting import ImagePredictor, network_classifier

PREPROCESSING = {
    "input_size": [3, 32, 32], "interpolation": "bicubic", "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.3],
    "crop_pct": 1.0,
}  # fmt: skip
NAMES = ["ant", "bee", "cat", "dog", "elk", 'fox, "red"']
EXAMPLE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
# AOTInductor compiles for half a minute.
ENGINES = [
    pytest.param(
        name,
        marks=[
            pytest.mark.skipif(
                name not in installed_engines(), reason=f"install it with: pip install {form.install}"
            ),
            *([pytest.mark.slow] if name not in ("onnxruntime", "openvino", "ncnn", "mnn") else []),
        ],
    )
    for name, form in FORMATS.items()
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a run: training form, plain form, ONNX, card; and images, one of them broken."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    net = refold.create_model("resnet10t", num_classes=6)
    torch.nn.init.normal_(net.fc.weight)  # type: ignore[union-attr, arg-type]
    refold.save(net, folder / "training.safetensors", class_names=NAMES, preprocessing=PREPROCESSING)
    plain = refold.fold(refold.load(folder / "training.safetensors"), EXAMPLE)
    refold.save(plain, folder / "plain.safetensors")
    refold.export(plain, folder / "plain.onnx", EXAMPLE)
    card = {"class_names": NAMES, "preprocessing": PREPROCESSING}
    (folder / "card.json").write_text(json.dumps(card))
    generator = np.random.default_rng(0)
    (folder / "album" / "inner").mkdir(parents=True)
    for name in ("a.png", "b.jpg", "inner/c.png"):
        Image.fromarray(generator.integers(0, 255, (50, 40, 3), dtype=np.uint8)).save(folder / "album" / name)
    (folder / "album" / "broken.png").write_bytes(b"no image")
    (folder / "album" / "notes.txt").write_text("no image either")
    return folder


class Tiny(nn.Module):
    """A classifier that every engine converts within a second or two."""

    def __init__(self, classes: int = 6) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.classifier = nn.Linear(8, classes)
        nn.init.normal_(self.classifier.weight, std=4.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.stem(x).relu().mean(dim=(2, 3)))


def tiny(folder: Path, **said: Any) -> nn.Module:
    """A tiny network as loaded from a checkpoint that says how its images are prepared, and its classes."""
    path = folder / "tiny.safetensors"
    refold.save(Tiny(), path, **{"class_names": NAMES, "preprocessing": PREPROCESSING, **said})
    return refold.load(path, Tiny)


def shares_of(predictor: ImagePredictor, images: Sequence[Path]) -> list[dict[str, float]]:
    """The probability of every class of each image."""
    return [dict(prediction.classes) for prediction in predictor.predict(images, top=99)]


def predicted(*arguments: object) -> Result:
    """What the command line prints; errors of refold's as it prints them, too."""
    result = CliRunner().invoke(app, ["predict", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, (RefoldError, SystemExit)), (
        result.exception
    )
    return result


def test_every_form_gives_the_classes_of_the_network(run: Path) -> None:
    net = refold.load(run / "training.safetensors")
    classifiers = [
        network_classifier(net),
        network_classifier(refold.load(run / "plain.safetensors")),
        exported_classifier(run / "plain.onnx"),
    ]
    transform = create_transform(
        (3, 32, 32), interpolation="bicubic", mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.3), crop_pct=1.0
    )
    path = run / "album" / "a.png"
    with torch.no_grad():
        expected = net(transform(Image.open(path))[None]).softmax(1)[0]
    order = expected.argsort(descending=True).tolist()
    for classifier in classifiers:
        (prediction,) = classifier.predict([path], top=5)
        assert [name for name, _ in prediction.classes] == [NAMES[index] for index in order[:5]]
        shares = [share for _, share in prediction.classes]
        assert shares == pytest.approx(expected[order[:5]].tolist(), rel=1e-3)
        assert sum(shares_of(classifier, [path])[0].values()) == pytest.approx(1, rel=1e-5)
        assert classifier.notes == []


@pytest.mark.parametrize("engine", ENGINES)
def test_a_file_says_what_is_baked_in(engine: str, run: Path, tmp_path: Path) -> None:
    net = tiny(tmp_path)
    images = find_images(
        [run / "album" / "inner", run / "album" / "a.png", run / "album" / "b.jpg"], LeftOut()
    )
    expected = shares_of(network_classifier(net), images)
    assert max(expected[0].values()) < 0.9, "a second softmax would be seen"
    # The card of another run lies beside the file, and does not count.
    (tmp_path / "card.json").write_text(
        json.dumps({"class_names": NAMES[::-1], "preprocessing": {"std": [9.0]}})
    )
    mean, std = ([255 * value for value in PREPROCESSING[name]] for name in ("mean", "std"))  # type: ignore[attr-defined]
    for normalize in (False, True, (mean, std)):
        for softmax in (False, True):
            path = tmp_path / f"net{FORMATS[engine].suffix}"
            refold.export(net, path, EXAMPLE, engine=engine, normalize=normalize, softmax=softmax)
            if engine in ("coreml", "tensorrt"):
                pytest.skip("the files run elsewhere")
            predictor = exported_classifier(path)
            for found, right in zip(shares_of(predictor, images), expected, strict=True):
                assert found == pytest.approx(right, abs=1e-5)
            assert predictor.notes == []


@pytest.mark.parametrize("batch", [1, 2])
def test_a_fixed_batch_is_filled(batch: int, run: Path, tmp_path: Path) -> None:
    net, path = tiny(tmp_path), tmp_path / "net.onnx"
    refold.export(net, path, EXAMPLE.expand(batch, -1, -1, -1), dynamic_batch=False)
    images = [run / "album" / name for name in ("a.png", "broken.png", "b.jpg", "inner/c.png", "a.png")]
    expected = list(network_classifier(net).predict(images))
    for found, right in zip(exported_classifier(path).predict(images), expected, strict=True):
        assert (found.image, found.error) == (right.image, right.error)
        assert dict(found.classes) == pytest.approx(dict(right.classes), abs=1e-5)


def test_the_file_is_asked_about_images_of_its_own_size(run: Path, tmp_path: Path) -> None:
    net, path = tiny(tmp_path), tmp_path / "net.onnx"
    refold.export(net, path, torch.rand(1, 3, 24, 40))
    predictor = exported_classifier(path)
    assert predictor.preprocessing.input_size == (3, 24, 40)
    assert len(shares_of(predictor, [run / "album" / "a.png"])[0]) == 6


class Softmaxed(Tiny):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).softmax(dim=1)


def test_a_network_that_gives_probabilities_is_not_softmaxed_again(run: Path, tmp_path: Path) -> None:
    images = [run / "album" / "a.png"]
    expected = shares_of(network_classifier(tiny(tmp_path)), images)[0]
    net = refold.load(tmp_path / "tiny.safetensors", Softmaxed)
    predictor = network_classifier(net)
    assert shares_of(predictor, images)[0] == pytest.approx(expected, abs=1e-5)
    assert predictor.notes == [
        "Softmaxed gives probabilities, though nothing says so; no softmax was applied."
    ]
    path = tmp_path / "net.onnx"
    with pytest.raises(InputError, match="Softmaxed gives probabilities by itself; leave softmax out"):
        refold.export(net, path, EXAMPLE, softmax=True)
    refold.export(net, path, EXAMPLE)
    predictor = exported_classifier(path)
    assert shares_of(predictor, images)[0] == pytest.approx(expected, abs=1e-5)
    assert predictor.notes == []


class Regression(Tiny):
    """Outputs that add up to one as those of least squares do, and are above zero for the photo."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = super().forward(x) / 15
        return outputs - outputs.mean(dim=1, keepdim=True) + 1 / 6


def test_outputs_that_happen_to_add_up_to_one_are_logits(run: Path, tmp_path: Path) -> None:
    tiny(tmp_path)
    net = refold.load(tmp_path / "tiny.safetensors", Regression)
    predictor = network_classifier(net)
    assert predictor.notes == []
    (shares,) = shares_of(predictor, [run / "album" / "a.png"])
    assert 0.1 < min(shares.values()) < max(shares.values()) < 0.3, (
        "small logits are nearly equal as probabilities"
    )


def rewritten(path: Path, **entries: str | None) -> Path:
    """A copy of an ONNX file with other metadata; None takes an entry away."""
    model = onnx.load(path)
    metadata = {entry.key: entry.value for entry in model.metadata_props} | entries
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {key: value for key, value in metadata.items() if value is not None})
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"class_names": '["a", "b", "c"]'}, r"net.onnx' has 3 class names for a network of 6 classes"),
        ({"class_names": "[1, 2]"}, r"net.onnx' says as class_names.0 is not understood: 1 \("),
        ({"class_names": "ant, bee"}, r"says as class_names is not understood: 'ant, bee'"),
        ({"class_names": "[" * 100_000}, r"says as class_names is not understood"),
        ({"preprocessing": '{"mean": "none"}'}, r"says as preprocessing.mean is not understood: 'none'"),
        ({"preprocessing": '{"std": [1, 0, 1]}'}, r"says as preprocessing.std.1 is not understood: 0 \("),
        ({"preprocessing": '{"mean": [0.5], "std": [1]}'}, r"3 channels with 1 means and 1 deviations"),
        ({"preprocessing": '{"input_size": [3, 1000000000, 7]}'}, r"input_size.1 is not understood: 1000000000"),
        ({"preprocessing": '{"input_size": [3, 64, 64]}'}, r"takes images of \(3, 32, 32\), but says"),
        ({"preprocessing": '{"interpolation": "by hand"}'}, r"says as preprocessing.interpolation is not"),
        ({"inputs": '[{"name": "image", "shape": [1000000000, 3, 32, 32], "dtype": "float32"}]'},
         r"says that a call takes 1000000000 images of \(3, 32, 32\)"),
        ({"inputs": '[{"name": "image", "shape": [0, 3, 32, 32], "dtype": "float32"}]'}, r"takes 0 images"),
        ({"inputs": '[{"name": "image", "shape": [1, 3, 32, 32], "dtype": "float32", "layout": "NHWC"}]'},
         r"inputs.0.layout is not understood: 'NHWC'"),
        ({"output": "answers"}, r"says as output is not understood: 'answers'"),
        ({"output": "probabilities"}, r"says that it gives probabilities, but the outputs for an image go from"),
        ({"preprocessing": '{"input_size": [3, 64, 64]}', "inputs": None}, r"cannot run .* shape \(1, 3, 64, 64\)"),
    ],
)  # fmt: skip
def test_a_wrong_description_is_one_sentence(
    entries: dict[str, str | None], message: str, run: Path, tmp_path: Path
) -> None:
    path = tmp_path / "net.onnx"
    refold.export(tiny(tmp_path), path, EXAMPLE)
    rewritten(path, **entries)
    with pytest.raises(InputError, match=message):
        list(exported_classifier(path).predict([run / "album" / "a.png"]))


def test_a_card_fills_what_a_file_does_not_say(run: Path, tmp_path: Path) -> None:
    net, path, images = tiny(tmp_path), tmp_path / "net.onnx", [run / "album" / "a.png"]
    refold.export(net, path, EXAMPLE)
    model = onnx.load(path)
    rewritten(path, **{entry.key: None for entry in model.metadata_props})
    with pytest.raises(
        InputError, match=r"net.onnx' does not say how its images are prepared, for refold did not"
    ):
        exported_classifier(path)
    card = tmp_path / "card.json"
    card.write_text((run / "card.json").read_text())
    predictor = exported_classifier(path)
    assert shares_of(predictor, images)[0] == pytest.approx(
        shares_of(network_classifier(net), images)[0], abs=1e-5
    )
    assert predictor.notes == [
        f"'{path}' does not say class_names, input_size, mean, std, interpolation, crop_pct; taken from '{card}' "
        "beside it.",
        f"'{path}' does not say whether it gives logits or probabilities; taken for logits.",
    ]
    for text in ("{", '{"class_names": 3}', '{"preprocessing": {"mean": ["x"]}}', "[" * 100_000):
        card.write_text(text)
        with pytest.raises(InputError, match=r"card.json' beside it cannot be read as the card of a run"):
            exported_classifier(path)


def test_what_a_network_does_not_say_is_guessed_aloud(run: Path, tmp_path: Path) -> None:
    refold.save(Tiny(1000), tmp_path / "net.safetensors")
    net: Any = refold.load(tmp_path / "net.safetensors", lambda: Tiny(1000))
    net.num_classes = 1000
    refold.export(net, tmp_path / "net.onnx", torch.rand(1, 3, 224, 224))
    predictors = [network_classifier(net), exported_classifier(tmp_path / "net.onnx")]
    shares = [shares_of(predictor, [run / "album" / "a.png"])[0] for predictor in predictors]
    assert shares[0] == pytest.approx(shares[1], abs=1e-5)
    for predictor in predictors:
        assert "does not say how images are prepared in full; taken as usual: " in predictor.notes[0]
        assert "mean (0.485, 0.456, 0.406)" in predictor.notes[0]
        assert "thousand classes are taken for those of ImageNet" in predictor.notes[1]


def test_outputs_that_are_no_numbers_are_no_class(run: Path, tmp_path: Path) -> None:
    class Cracked(Tiny):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            outputs = super().forward(x)
            outputs[0, 3] = float("nan")
            return outputs

    tiny(tmp_path)
    net = refold.load(tmp_path / "tiny.safetensors", Cracked)
    first, second = network_classifier(net).predict([run / "album" / "a.png", run / "album" / "b.jpg"])
    assert first.classes == []
    assert "a.png' has no prediction: Cracked gives NaN or infinity for it" in str(first.error)
    assert second.error is None
    assert len(second.classes) == 5
    predictor = dataclasses.replace(network_classifier(net), output="probabilities")
    (alone,) = predictor.predict([run / "album" / "a.png"])
    assert alone.classes == []
    with pytest.raises(InputError, match=r"The network gives 1 of 6 values of output 0 as NaN or infinity"):
        refold.export(net, tmp_path / "net.onnx", EXAMPLE, fold=False)
    assert not (tmp_path / "net.onnx").exists()


@pytest.mark.parametrize("names", [NAMES[:3], "abcdef", [1, 2, 3, 4, 5, 6]])
def test_class_names_of_another_number_are_refused(names: Any, run: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    with pytest.raises(
        InputError, match=r"The export has 3 class names for a network of 6 classes|give a list of texts"
    ):
        refold.export(tiny(tmp_path), path, EXAMPLE, class_names=names)
    assert not path.exists()
    net: Any = tiny(tmp_path)
    object.__setattr__(net.card, "class_names", NAMES[:3])
    with pytest.raises(InputError, match=r"Tiny has 3 class names for a network of 6 classes"):
        refold.export(net, path, EXAMPLE)
    with pytest.raises(InputError, match=r"Tiny has 3 class names for a network of 6 classes"):
        list(network_classifier(net).predict([run / "album" / "a.png"]))


@pytest.mark.parametrize(
    "suffix", [form.suffix for name, form in FORMATS.items() if name in installed_engines()]
)
def test_a_damaged_file_is_one_sentence(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"net{suffix}"
    with pytest.raises(InputError, match=r"There is no (file|folder)"):
        exported_classifier(path)
    if suffix == ".mlpackage":
        path.mkdir()
    else:
        path.write_bytes(np.random.default_rng(0).bytes(3000))
    path.with_suffix(".bin").write_bytes(b"1")
    with pytest.raises(InputError, match=r"cannot (read|load|run) '.*net"):
        exported_classifier(path)


def test_folders_json_and_what_cannot_be_read(run: Path) -> None:
    results = {}
    for target in (run / "training.safetensors", run / "plain.onnx", run):
        result = predicted(target, run / "album", run / "album" / "b.jpg", "--json", "--top", 2)
        assert str(result.exception) == "1 of 5 images have no prediction."
        described = json.loads(result.stdout)
        assert [Path(entry["image"]).name for entry in described] == [
            "a.png", "b.jpg", "broken.png", "c.png", "b.jpg",
        ]  # fmt: skip
        assert [len(entry["classes"]) for entry in described] == [2, 2, 0, 2, 2]
        assert [entry["error"] is None for entry in described] == [True, True, False, True, True]
        assert "broken.png" in described[2]["error"]
        assert described[1] == described[4]
        results[target.name] = [[entry["name"] for entry in one["classes"]] for one in described]
    assert results["training.safetensors"] == results["plain.onnx"] == results[run.name]
    shown = predicted(run / "plain.safetensors", run / "album")
    assert isinstance(shown.exception, InputError), "which main turns into exit code 2"
    assert [line.split(": ")[0] for line in shown.stdout.splitlines()] == [
        str(run / "album" / name) for name in ("a.png", "b.jpg", "inner/c.png")
    ]
    assert "broken.png' cannot be read" in shown.stderr
    assert predicted(run, run / "album" / "a.png").exit_code == 0


def test_csv(run: Path) -> None:
    expected = shares_of(exported_classifier(run / "plain.onnx"), [run / "album" / "a.png"])[0]
    result = predicted(run, run / "album" / "a.png", "--csv", "--top", 6)
    assert result.exit_code == 0
    heading, *rows = csv.reader(io.StringIO(result.stdout))
    assert heading == ["image", "rank", "class", "probability"]
    assert [row[:3] for row in rows] == [
        [str(run / "album" / "a.png"), str(rank), name] for rank, name in enumerate(expected, start=1)
    ]
    assert [float(row[3]) for row in rows] == pytest.approx(list(expected.values()), rel=1e-3)
    with pytest.raises(InputError, match="choose one"):
        CliRunner().invoke(
            app, ["predict", str(run), str(run / "album"), "--csv", "--json"], catch_exceptions=False
        )


def test_names_are_printed_without_control_characters(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    names = [*NAMES[:5], "fo\x1b[31mx\ny"]
    refold.export(tiny(tmp_path), path, EXAMPLE, class_names=names)
    for option in ([], ["--csv"]):
        shown = predicted(path, run / "album" / "a.png", "--top", 6, *option).stdout
        assert "\x1b" not in shown
        assert r"fo\x1b[31mx\ny" in shown


def test_which_target(run: Path, tmp_path: Path) -> None:
    image = run / "album" / "a.png"
    assert "holds neither plain.safetensors nor training.safetensors" in str(
        predicted(tmp_path, image).exception
    )
    (tmp_path / "training.safetensors").write_bytes((run / "training.safetensors").read_bytes())
    unfinished = predicted(tmp_path, image)
    assert unfinished.exit_code == 0
    assert "is not finished; its best network so far predicts" in unfinished.stderr
    for target in (run, run / "plain.onnx"):
        refused = predicted(target, image, "--num-classes", 6)
        assert "leave --checkpoint and --num-classes out" in str(refused.exception)


def test_a_thousand_classes_are_those_of_imagenet(run: Path) -> None:
    net = refold.create_model("resnet10t").eval()
    torch.nn.init.zeros_(net.fc.weight)  # type: ignore[union-attr, arg-type]
    with torch.no_grad():
        net.fc.bias.copy_(torch.eye(1000)[1] * 20)  # type: ignore[union-attr, operator]
    (prediction,) = network_classifier(net).predict([run / "album" / "a.png"], top=1)
    assert prediction.classes[0][0].startswith("goldfish")


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"There is no image '.*nothing.png'"):
        find_images([tmp_path / "nothing.png"], LeftOut())
    with pytest.raises(InputError, match="holds no images"):
        find_images([tmp_path], LeftOut())
