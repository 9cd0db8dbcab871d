"""End a short run at each of its file operations, go on with it, and compare what comes of it with a run in one go.

``python killed_at_every_write.py FOLDER SIGNAL [STRIDE]`` prints how many operations there were; it fails where a run
cannot go on, ends with other bits or leaves something behind. Every process is forked from this one, which has
imported everything already.
"""

import csv
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from refold.errors import RefoldError
from refold.export import checked, get_engine
from refold.training.recipe import load_recipe
from refold.training.run import Settings, resume, train

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = {
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.chmod",
    "os.truncate",
    "os.link",
    "os.symlink",
}


def end_at(number: int, within: Path, how: int, log: Path) -> None:
    """Send this process a signal before its ``number``-th operation that changes something in a folder."""
    place, seen = str(within), 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & _WRITES:
                return
        elif event in _CHANGES:
            path = arguments[0]
        else:
            return
        if not isinstance(path, str | bytes | os.PathLike) or not os.fsdecode(path).startswith(place):
            return
        seen += 1
        if seen == number:
            log.write_text(f"{event} {os.fsdecode(path)[len(place) :]}")
            os.kill(os.getpid(), how)

    sys.addaudithook(hook)


def in_a_fork(work: Callable[[], Any]) -> int:
    """How a process that does the work ends: its exit code, or minus the signal."""
    process = os.fork()
    if process == 0:
        try:
            signal.signal(signal.SIGTERM, _interrupt)
            work()
        except KeyboardInterrupt:
            os._exit(130)
        except RefoldError as error:
            print(error, flush=True)
            os._exit(2)
        except BaseException:  # of a defect; a fork must never go on as its parent
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def here(engine: str, path: Path, calls: Any) -> Any:
    """Run an exported file in this process, for starting another takes longer than the run."""
    session = get_engine(engine).open(path)
    return [session(*call) for call in calls]


def result_of(folder: Path) -> dict[str, Any]:
    """What a run comes to: its files, all weights, and the history without its clock."""
    state = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    tensors = {f"last.{key}": value for key, value in state.items()}
    for form in ("training", "plain"):
        tensors |= {
            f"{form}.{key}": value for key, value in load_file(folder / f"{form}.safetensors").items()
        }
    with (folder / "history.csv").open() as lines:
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(lines)]
    return {"files": sorted(path.name for path in folder.iterdir()), "tensors": tensors, "history": rows}


def check_same(found: dict[str, Any], expected: dict[str, Any], when: str) -> None:
    assert found["files"] == expected["files"], (when, found["files"])
    assert found["history"] == expected["history"], when
    tensors = found["tensors"]
    assert tensors.keys() == expected["tensors"].keys(), when
    assert all(torch.equal(tensors[key], value) for key, value in expected["tensors"].items()), when


def main(root: Path, how: int, stride: int) -> None:
    torch.set_num_threads(1)
    checked.run_apart = here
    checked.start = lambda: None
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        (root / "data" / name).mkdir(parents=True)
        for index in range(8):
            pixels = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "data" / name / f"{index}.png")
    recipe = load_recipe("small_images", {"epochs": 2, "batch_size": 4, "image_size": 32, "ema_decay": 0.9})
    quiet = Console(quiet=True)

    def told(folder: Path) -> Settings:
        return Settings(folder, str(root / "data"), "test_efficientnet", recipe)

    whole = root / "whole"
    assert in_a_fork(lambda: train(told(whole), quiet)) == 0
    expected = result_of(whole)
    number, ended = 1, True
    while ended:
        folder, log = root / f"run{number}", root / "log"
        log.unlink(missing_ok=True)

        def killed(folder: Path = folder, number: int = number, log: Path = log) -> None:
            end_at(number, folder, how, log)
            train(told(folder), quiet)

        code = in_a_fork(killed)
        ended = log.exists()
        when = f"operation {number}, {log.read_text() if ended else 'none'}"
        # A run that SIGTERM meets at its very end, or that only tidies up by then, ends well.
        assert code in ({-how, 130, 0} if how == signal.SIGTERM else {-how}) if ended else code == 0, (
            when,
            code,
        )
        # Tidying up that is interrupted itself is left to whoever goes on.
        if how == signal.SIGTERM and folder.exists() and "os.rm" not in when and "os.remove" not in when:
            left = [path.name for path in folder.iterdir() if path.name.endswith(".part")]
            assert not left, (when, left)
        begun = (folder / "run.json").exists()
        code = in_a_fork(lambda: resume(folder, quiet) if begun else train(told(folder), quiet))  # noqa: B023
        assert code == 0, (when, code)
        check_same(result_of(folder), expected, when)
        shutil.rmtree(folder)
        number += stride
    print(number)


if __name__ == "__main__":
    main(Path(sys.argv[1]), signal.Signals[sys.argv[2]], int(sys.argv[3]) if len(sys.argv) > 3 else 1)
