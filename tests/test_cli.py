"""The command line: what it prints, what it writes, and one line and exit code 2 for every mistake."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import typer
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

import refold
from refold import cli
from refold.checkpoints import read_card
from refold.cli import _COMMANDS
from refold.unfolding import PLANS

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def checkpoint(
    randomised: Callable[[nn.Module], nn.Module], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A training-form checkpoint."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "net.safetensors"
    net = randomised(refold.create_model("repghostnet_050", num_classes=4))
    refold.save(net, path, preprocessing={"input_size": [3, 48, 48]})
    return path


def test_list(call: Run) -> None:
    code, out, err = call("list", "repghost*")
    assert (code, err) == (0, "")
    assert out.split() == refold.list_models("repghost*")
    assert json.loads(call("list", "repvgg_a*", "--json")[1]) == refold.list_models("repvgg_a*")
    assert "resnet50" not in call("list")[1].split()
    assert "resnet50" in call("list", "--timm")[1].split()


def test_profile_shows_both_forms(call: Run, checkpoint: Path) -> None:
    code, out, _ = call("profile", checkpoint, "--json")
    profile = json.loads(out)
    assert code == 0
    assert profile["input_size"] == [3, 48, 48]
    assert profile["training form"]["operators"]["batch norm"] == 112
    assert "batch norm" not in profile["plain"]["operators"]
    assert profile["plain"]["macs"] <= profile["training form"]["macs"]
    for form in ("plain", "training form"):
        assert 0 < profile[form]["winograd_multiplications"] < profile[form]["macs"]
    code, out, _ = call("profile", "repghostnet_050", "--input-size", "64x96", "--num-classes", "7")
    assert code == 0
    assert "3 x 64 x 96" in out
    assert re.search(r"batch norm +│ +112 +│ +0 ", out)


def test_fold_verify_and_export(call: Run, checkpoint: Path, tmp_path: Path) -> None:
    code, out, err = call("fold", checkpoint, "-o", "plain.safetensors", "--report", "report.json")
    assert (code, err) == (0, "")
    assert "plain.safetensors" in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["proof"]["distance_float64"] <= 1e-9
    card: Any = read_card(tmp_path / "plain.safetensors")
    assert card.form == "plain"
    assert card.preprocessing == {"input_size": [3, 48, 48]}

    code, out, _ = call("verify", checkpoint, "plain.safetensors", "--json")
    assert code == 0
    assert json.loads(out)["distance_float64"] <= 1e-5  # the plain weights were rounded to float32
    assert "compute the same" in call("verify", checkpoint, "plain.safetensors")[1]

    assert "training form" not in json.loads(call("profile", "plain.safetensors", "--json")[1])
    code, out, _ = call("export", "plain.safetensors", "-o", "net.onnx", "--json")
    assert code == 0
    assert json.loads(out)["form"] == "plain"
    assert (tmp_path / "net.onnx").stat().st_size == json.loads(out)["bytes"]
    assert "|Δ|" in call("export", checkpoint, "-o", "branches.onnx", "--no-fold", "--fixed-batch")[1]


def test_unfold_and_the_way_back(call: Run, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = refold.create_model("resnet10t", num_classes=4)
    options = (
        "--plan",
        "repvgg",
        "--layers",
        "layer*",
        "--exclude",
        "layer4*",
        "--stages",
        "3",
        "--stages",
        "4",
    )
    options += ("--branches", "layer2.0.conv1=3", "--branches", "2", "--seed", "3", "--input-size", "64")
    code, out, err = call("unfold", "resnet10t", "--num-classes", "4", "-o", "wide.safetensors", *options)
    assert (code, err) == (0, "")
    assert re.search(r"dense +│ +4 │ +3 to 4 │ +2 │", out), out
    total = sum(p.numel() for p in model.parameters())
    assert f"{total:,} │" in out
    wide: Any = refold.load("wide.safetensors")
    assert wide.state_dict()["fc.weight"].equal(model.state_dict()["fc.weight"]), (
        "the seed is that of the weights"
    )
    assert {layer.path: layer.branches for layer in wide.unfold_report.layers} == {
        "layer2.0.conv1": 4,
        "layer2.0.conv2": 3,
        "layer3.0.conv1": 3,
        "layer3.0.conv2": 3,
    }
    code, out, _ = call("unfold", "resnet10t", "--plan", "repvgg", "--start", "random", "--json")
    written = json.loads(out)
    assert written["parameters"] > written["parameters_before"] > total
    assert len(written["layers"]) == 11
    assert call("fold", "wide.safetensors", "--input-size", "64", "-o", "plain.safetensors")[0] == 0
    code, out, err = call("fold", "wide.safetensors", "--original", "-o", "back.safetensors")
    assert (code, err) == (0, "")
    assert "resnet10t computes the same without the branches" in out
    back = timm.create_model("resnet10t", num_classes=4).eval()
    back.load_state_dict(load_file("back.safetensors"), strict=True)
    x = torch.randn(2, 3, 64, 64)
    for path in ("wide.safetensors", "plain.safetensors", "back.safetensors"):
        assert torch.allclose(refold.load(path)(x), back(x), rtol=1e-4, atol=1e-5)


def test_plans_are_shown_and_read_from_files(call: Run, tmp_path: Path) -> None:
    code, out, _ = call("unfold", "--list")
    assert code == 0
    assert all(name in out for name in PLANS)
    assert [plan["name"] for plan in json.loads(call("unfold", "--list", "--json")[1])] == list(PLANS)
    (tmp_path / "mine.yaml").write_text("repeats: 2\nrules:\n  dense: [row, '1x1, same']\n")
    (tmp_path / "mine.json").write_text(
        '{"name": "mine", "repeats": 2, "rules": {"dense": ["row", "1x1, same"]}}'
    )
    found = [
        json.loads(call("unfold", "resnet10t", "--plan", f"mine.{suffix}", "--json")[1])
        for suffix in ("yaml", "json")
    ]
    assert found[0] == found[1]
    assert found[0]["plan"] == "mine"
    assert found[0]["layers"][0]["shapes"] == ["row", "1x1, same"]


def test_a_named_model_is_filled_from_a_foreign_checkpoint(
    call: Run, checkpoint: Path, tmp_path: Path
) -> None:
    net = refold.load(checkpoint)
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    arguments = ("repghostnet_050", "--checkpoint", "weights.pth", "--num-classes", 4, "--input-size", 48)
    assert call("fold", *arguments, "-o", "plain.safetensors")[0] == 0
    images = torch.randn(2, 3, 48, 48)
    plain = refold.load(tmp_path / "plain.safetensors", form="plain")
    with torch.no_grad():
        assert torch.allclose(plain(images), net(images), rtol=1e-3, atol=1e-5)


def test_other_weights_are_not_the_same_function(call: Run, checkpoint: Path, tmp_path: Path) -> None:
    other = refold.load(checkpoint)
    with torch.no_grad():
        next(p for name, p in other.named_parameters() if name.endswith("fc.bias")).add_(0.1)
    refold.save(other, tmp_path / "other.safetensors")
    code, out, err = call("verify", checkpoint, "other.safetensors")
    assert (code, out) == (2, "")
    assert "do not compute the same function" in err


def test_every_mistake_is_one_line_and_exit_code_2(call: Run, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(checkpoint.read_bytes()[:5000])
    (tmp_path / "foreign.safetensors").write_bytes(b"not a checkpoint at all")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pth")
    (tmp_path / "one" / "class").mkdir(parents=True)
    (tmp_path / "bad.json").write_text('{"dense": ["row"]}')
    before = sorted(tmp_path.iterdir())
    for arguments, message in (
        (("profile", "repghostnet_05"), "repghostnet_050"),
        (("list", "nosuch*"), "No model matches 'nosuch*'"),
        (("profile", "missing.safetensors"), "There is no checkpoint file 'missing.safetensors'"),
        (("profile", "cut.safetensors"), "may be truncated"),
        (("fold", "foreign.safetensors", "-o", "x.safetensors"), "no readable safetensors file"),
        (("fold", "linear.pth", "-o", "x.safetensors"), "does not name its network"),
        (("fold", "repvgg_a0", "--checkpoint", "linear.pth", "-o", "x"), "linear.pth"),
        (("fold", checkpoint, "--num-classes", "9", "-o", "x.safetensors"), "expected (9, "),
        (("fold", checkpoint, "--checkpoint", "linear.pth", "-o", "x"), "is a checkpoint already"),
        (("fold", checkpoint, "--input-size", "1x48x48", "-o", "x"), "cannot run on"),
        (("fold", checkpoint, "--input-size", "big", "-o", "x"), "The input size 'big' is not understood"),
        (("fold", checkpoint, "-o", "missing/x.safetensors"), "the folder 'missing' does not exist"),
        (("fold", checkpoint, "-o", "x.safetensors", "--report", "one"), "'one' is a folder"),
        (("unfold",), "There is nothing to unfold"),
        (("unfold", checkpoint, "--plan", "repvg"), "Did you mean 'repvgg'? There are: ghostnetv3, repvgg"),
        (("unfold", checkpoint, "--plan", "no.yaml"), "The plan 'no.yaml' cannot be read (No such file"),
        (("unfold", checkpoint, "--plan", "bad.json"), "The plan 'bad.json' has no rules"),
        (
            ("unfold", checkpoint, "--layers", "layer1.*"),
            "matches 'layer1.*'; there are: stem.conv, stages.0",
        ),
        (("unfold", checkpoint, "--kinds", "round"), "no kind of layer 'round'; choose from pointwise"),
        (("unfold", checkpoint, "--stages", "9"), "is in stage 9; there are: 1, 2"),
        (("unfold", checkpoint, "--branches", "many"), "--branches 'many' is not understood"),
        (("unfold", checkpoint, "--branches", "0"), "0 branches for '*' are too few"),
        (("unfold", checkpoint, "--pretrained"), "The weights come from one place"),
        (("unfold", checkpoint, "-o", "missing/x.safetensors"), "the folder 'missing' does not exist"),
        (("fold", checkpoint, "--original", "-o", "x.safetensors"), "carries no unfold report"),
        (
            ("fold", checkpoint, "--original", "--report", "r.json", "-o", "x"),
            "--original folds branches only",
        ),
        (("export", checkpoint, "-o", "one"), "'one' is a folder"),
        (("export", checkpoint, "-o", "x.onnx", "--engine", "abacus"), "There is no engine 'abacus'"),
        (("quickstart", "--data", "missing"), "There is no folder 'missing'"),
        (("quickstart", "--data", "one"), "only the class 'class'"),
        (("quickstart", "-o", "linear.pth"), "cannot be made"),
    ):
        code, _, err = call(*arguments)
        assert code == 2, arguments
        assert err.startswith("refold: "), err
        assert err.count("\n") == 1, err
        assert message in err, (arguments, err)
        assert sorted(tmp_path.iterdir()) == before, arguments


def test_ctrl_c_says_what_is_left_and_exits_with_130(
    call: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(settings: Any, _: object) -> None:
        settings.output.mkdir()
        (settings.output / "run.json").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("refold.quickstart.run", interrupted)
    code, _, err = call("quickstart", "-o", "run")
    assert code == 130
    assert err == "refold: stopped; go on with: refold train --resume run\n"


def test_help_and_version_need_no_torch() -> None:
    script = (
        "import sys; sys.argv = ['refold', {!r}]\n"
        "from refold.cli import main\n"
        "try: main()\n"
        "except SystemExit as e: assert not e.code\n"
        "assert 'torch' not in sys.modules and 'timm' not in sys.modules"
    )
    for option, expected in (("--help", "quickstart"), ("--version", "refold 0")):
        done = subprocess.run(
            [sys.executable, "-c", script.format(option)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout


@pytest.mark.parametrize("command", [(), *((name,) for name in sorted(_COMMANDS))])
def test_help_names_every_option_whole_at_80_columns(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for width in ("COLUMNS", "TERMINAL_WIDTH"):
        monkeypatch.setenv(width, "80")
    result = CliRunner().invoke(cli.app, [*command, "--help"], catch_exceptions=False)
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "…" not in result.stdout
    described: Any = typer.main.get_command(cli.app)
    if command:
        described = described.commands[command[0]]
    names = {name for parameter in described.params for name in (*parameter.opts, *parameter.secondary_opts)}
    options = {name for name in names if name.startswith("-")}
    assert "--help" in result.stdout
    if command:
        assert options
    else:
        # A command is described by its whole sentence.
        assert "--checkpoint takes its published weights." in result.stdout
    for name in options:
        assert re.search(rf"(?<![\w-]){name}(?![\w-])", result.stdout), name


def test_the_public_names_are_there() -> None:
    for name in refold.__all__:
        assert callable(getattr(refold, name)), name
    assert set(refold.__all__) <= set(dir(refold))
    import_module("refold.export.onnxruntime")
    assert refold.export is not sys.modules["refold.export"], "the name stays the function"
    with pytest.raises(AttributeError, match="no attribute 'deploy'"):
        _ = refold.deploy  # type: ignore[attr-defined]


def test_what_nobody_foresaw_is_one_line_too(call: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> list[str]:
        raise RuntimeError("an odd \x1b[31mthing\nhappened")

    monkeypatch.setattr("refold.models.list_models", broken)
    code, out, err = call("list")
    assert (code, out) == (2, "")
    assert err == "refold: RuntimeError: an odd \\x1b[31mthing; --debug shows where it comes from.\n"
    for arguments in (["--debug", "list"], ["list", "--debug"]):
        monkeypatch.setattr(sys, "argv", ["refold", *arguments])
        with pytest.raises(RuntimeError, match="odd"):
            cli.main()

    def full(*_: object, **__: object) -> list[str]:
        raise MemoryError

    monkeypatch.setattr("refold.models.list_models", full)
    assert call("list")[2].startswith("refold: The memory does not suffice")

    def missing(*_: object, **__: object) -> list[str]:
        raise PermissionError(13, "Permission denied", "/there/file")

    monkeypatch.setattr("refold.models.list_models", missing)
    assert call("list")[2] == "refold: '/there/file' cannot be used: Permission denied.\n"


@pytest.mark.slow
def test_sigterm_ends_any_command_as_ctrl_c_does(tmp_path: Path) -> None:
    path = tmp_path / "plain.safetensors"
    script = (
        "import os, signal, sys; from refold import cli; from refold.folding import fold as _; import refold.folding\n"
        "refold.folding.fold = lambda *a, **k: os.kill(os.getpid(), signal.SIGTERM)\n"
        f"sys.argv = ['refold', 'fold', 'repvgg_a0', '-o', {str(path)!r}]; cli.main()"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (ended.returncode, "Traceback" in ended.stderr) == (130, False), ended.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("epochs=inf", "'epochs' is 'inf'"), ("epochs=.inf", "'epochs' is inf"), ("epochs=.nan", "'epochs' is nan"),
        ("learning_rate=-1", "'learning_rate' is -1"), ("epochs=1e400", "'epochs' is"), ("epochs=[1]", "'epochs' is"),
        ("auto_augment=nonsense", "'auto_augment' is 'nonsense'"), ("optimizer=nonsense", "'optimizer' is 'nonsense'"),
        ("epochs", "is no setting"), ("schedule=null", "'schedule' is None"), ("image_size=3", "'image_size' is 3"),
        ("crop_scale={a: 1}", "'crop_scale' is"), ("mixup=true", "'mixup' is True"),
    ],
)  # fmt: skip
def test_a_bad_value_of_a_recipe_is_one_line(call: Run, setting: str, message: str) -> None:
    code, _, err = call("train", "--data", "digits", "-o", "run", "--set", setting)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("lst", "No such command 'lst'"),
        ("train --sed 1", "No such option"),
        ("train --seed -1", "Invalid value for '--seed'"),
        ("train --workers=many", "(given: 'many'); refold train --help names all options."),
        ("train --seed 4294967296", "(given: '4294967296')"),
        ("fold", "Missing argument"),
        ("fold repvgg_a0", "Missing option '--output'"),
        ("fold repvgg_a0 -o x --objective speed", "(given: 'speed')"),
    ],
)
def test_a_mistyped_command_is_one_line(call: Run, arguments: str, message: str) -> None:
    code, out, err = call(*arguments.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("refold: ")
    assert message in err


@pytest.fixture(scope="module")
def onnx_file(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint's network in training form as an ONNX file."""
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    refold.export(refold.load(checkpoint), path, torch.randn(1, 3, 48, 48), fold=False)
    return path


def test_an_onnx_file_is_folded_and_is_a_model(call: Run, onnx_file: Path, tmp_path: Path) -> None:
    out = call("fold", onnx_file, "-o", "plain.onnx", "--report", "r.json", "--picture", "p.svg")[1]
    assert "net.onnx: " in out
    assert "Plain file: plain.onnx" in out
    assert "in ONNX Runtime" in out
    assert {path.name for path in tmp_path.iterdir()} == {"plain.onnx", "r.json", "p.svg"}
    regions = json.loads((tmp_path / "r.json").read_text())["regions"]
    assert {"stages.0.0"} <= {region["path"] for region in regions}
    proof = json.loads(call("verify", onnx_file, "plain.onnx", "--json")[1])
    assert proof["distance_float64"] < 1e-6
    costs = json.loads(call("profile", "plain.onnx", "--json")[1])
    assert costs["input_size"] == [3, 48, 48]
    assert costs["plain"]["operators"] == costs["training form"]["operators"]
    code, _, err = call("bench", onnx_file, "plain.onnx", "--rounds", "1", "--warm-up", "0", "-o", "b.json")
    assert code == 0, err
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert {tuple(row["configuration"][key] for key in ("model", "form")) for row in rows} >= {
        ("net", "training"),
        ("net", "plain"),
    }


def test_what_does_not_go_with_an_onnx_file(
    call: Run, onnx_file: Path, checkpoint: Path, tmp_path: Path
) -> None:
    for arguments, message in (
        (("fold", onnx_file, "-o", "x.safetensors"), "give a name that ends in .onnx"),
        (("fold", onnx_file, "-o", "x.onnx", "--original"), "not for ONNX files"),
        (("fold", onnx_file, "-o", "x.onnx", "--checkpoint", checkpoint), "is a whole network"),
        (("fold", onnx_file, "-o", "x.onnx", "--input-size", "50"), "?x3x48x48, not 1x3x50x50"),
        (("fold", "none.onnx", "-o", "x.onnx"), "There is no file 'none.onnx'"),
        (("train", "--data", ".", "--network", onnx_file, "-o", "run"), "is no checkpoint"),
    ):
        code, _, err = call(*arguments)
        assert code == 2, arguments
        assert err.count("\n") == 1, err
        assert message.lower() in err.lower(), (arguments, err)
        assert not list(tmp_path.iterdir()), arguments
