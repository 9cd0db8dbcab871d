"""Fill the columns of the papers' tables that were measured on graphics cards, within a given time.

Usage: python benchmarks/gpu.py [--device cuda|cpu] [--minutes N] [--folder FOLDER] [--tables NAME ...] [...]

Every table is one `refold paper` command with few rounds, in eager mode and on a card as CUDA graphs too, the tables
with the fewest networks first. All share FOLDER/results.json, so that a network of several tables is measured once and
a call after another goes on where that one ended; FOLDER has each table as Markdown and JSON. When the time is over,
the command that runs is interrupted as by Ctrl-C and keeps what it has.
"""

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path

TABLES = (
    "ghostnets/table-15",
    "ghostnets/table-17",
    "repvgg/figure-6",
    "repnext/figure-5",
    "repnext/table-2",
    "repnext/table-3",
    "repnext/table-6",
    "repnext/table-5",
    "ghostnets/table-18",
    "repvgg/figure-4",
    "repnext/table-4",
)
# What a command may take to keep what it has.
SECONDS_TO_STOP = 20.0


def command(name: str, arguments: argparse.Namespace) -> list[str]:
    """The `refold paper` command of a table."""
    stem = arguments.folder / name.replace("/", "-")
    words = [
        sys.executable,
        "-m",
        "refold",
        "paper",
        name,
        "--engine",
        "pytorch",
        "--device",
        arguments.device,
    ]
    executions = arguments.executions or (["eager"] if arguments.device == "cpu" else ["eager", "graphs"])
    for option, values in (
        ("--execution", executions),
        ("--precision", arguments.precisions),
        ("--memory-format", arguments.memory_formats),
        ("--only", arguments.only),
        ("--output", [f"{stem}.md", f"{stem}.json"]),
    ):
        words += [word for value in values for word in (option, value)]
    if arguments.largest_batch is not None:
        words += ["--largest-batch", str(arguments.largest_batch)]
    words += ["--rounds", str(arguments.rounds), "--warm-up", "2"]
    return [*words, "--results", str(arguments.folder / "results.json")]


def run(words: list[str], seconds: float) -> str:
    """Run a command for at most so many seconds; how it ended, in a word or two."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return "interrupted"
    return "done" if code == 0 else f"failed with exit code {code}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--folder", type=Path, default=Path("gpu"))
    parser.add_argument("--tables", nargs="+", default=TABLES)
    parser.add_argument("--executions", nargs="+", default=[])
    parser.add_argument("--precisions", nargs="+", default=["float32"])
    parser.add_argument("--memory-formats", nargs="+", default=["channels_first"])
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--largest-batch", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * arguments.minutes
    ended = {}
    for name in arguments.tables:
        left = end - time.monotonic()
        ended[name] = run(command(name, arguments), left) if left > 0 else "not begun"
        print(f"{name}: {ended[name]}, {max(0.0, end - time.monotonic()):.0f} s left", flush=True)
    return 0 if set(ended.values()) == {"done"} else 1


if __name__ == "__main__":
    sys.exit(main())
