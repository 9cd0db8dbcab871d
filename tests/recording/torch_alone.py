"""Run in a worker process: fold and verify where nothing is installed but PyTorch and what it depends on."""

import re
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, files, requires
from typing import Any


def needed(package: str, found: set[str]) -> set[str]:
    """A package and all that it depends on, whatever the platform."""
    name = re.split(r"[^\w.-]", package)[0]
    if name in found:
        return found
    try:
        wanted = [text for text in requires(name) or () if "extra ==" not in text]
    except PackageNotFoundError:
        return found
    found.add(name)
    for other in wanted:
        needed(other, found)
    return found


def modules(packages: set[str]) -> set[str]:
    """The names under which packages are imported."""
    places = [place for package in packages for place in files(package) or ()]
    return {place.parts[0].removesuffix(".py").split(".")[0] for place in places if ".." not in place.parts}


ALLOWED = modules(needed("torch", set())) | set(sys.stdlib_module_names) | {"refold"}
find_spec = PathFinder.find_spec


def find_installed(name: str, path: Any = None, target: Any = None) -> Any:
    """What is on the disk, of the packages that count as installed."""
    return find_spec(name, path, target) if path is not None or name in ALLOWED or name[0] == "_" else None


def what_is_missing(use: Callable[[], object]) -> str:
    """What the error says of the package that is not there."""
    try:
        use()
    except ModuleNotFoundError as error:
        return str(error)
    return "nothing is missing"


def main() -> None:
    PathFinder.find_spec = staticmethod(find_installed)  # type: ignore[method-assign]
    import torch
    from torch import nn

    import refold

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)
    ).eval()
    x = torch.randn(1, 3, 8, 8)
    plain: Any = refold.fold(model, x)
    assert plain.fold_report.after.batch_norms == 0
    assert refold.verify(model, plain, x).distance_float64 < 1e-6
    assert "regions" in plain.fold_report.to_json()
    for name in ("create_model", "save", "unfold", "benchmark"):
        wanted = what_is_missing(lambda name=name: getattr(refold, name))  # type: ignore[misc]
        assert re.match(rf"refold.{name} needs the package \w+, .*: pip install refold", wanted), wanted
    assert "refold.export needs" in what_is_missing(lambda: refold.export(model, "net.onnx", x))
    others = {name.partition(".")[0] for name in sys.modules} & {
        "timm",
        "torchvision",
        "numpy",
        "rich",
        "typer",
    }
    print("folded", sorted(others))


if __name__ == "__main__":
    main()
