"""What happens beside the training: progress, the files that an interrupted run leaves, and what could not be read."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from torch import nn
from torch.distributed import all_gather_object

from refold.errors import InputError
from refold.files import write_text, written_aside
from refold.training.module import TrainingModule
from refold.training.progress import progress, tell

EpochRow = dict[str, Any]


class Keeper(Callback):
    """After each epoch: the best network so far, the state to resume from, and a line of the history.

    ``save`` writes a network with its row; the best is the one with the highest held-out score of the task, of
    the trained weights and their average, the later of two equals. With ``last`` the newest epoch counts as the best,
    and its average where there is one, so that the held-out images choose nothing. Its files appear whole or not
    at all.
    """

    def __init__(
        self, state: Path, history: Path, save: Callable[[nn.Module, EpochRow], None], last: bool = False
    ) -> None:
        self.state_file = state
        self.history_file = history
        self.save = save
        self.last = last
        self.rows: list[EpochRow] = []
        self.best: EpochRow | None = None
        self.score = ""
        self._start = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows, self.best = state_dict["rows"], state_dict["best"]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        results = pl_module.epoch_results()
        self.score = f"held_out_{pl_module.task.score}"
        scores = {name: results[f"{self.score}_{name}"] for name in pl_module.held_out_measures}
        # Of equals the last: the moving average of the weights.
        candidates = list(scores)[-1:] if self.last else reversed(list(scores))
        weights = max(candidates, key=lambda name: scores[name])
        row: EpochRow = {
            "epoch": trainer.current_epoch + 1,
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            **results,
            "weights": weights,
            self.score: scores[weights],
            "seconds": time.perf_counter() - self._start,
        }
        self.rows.append(row)
        if self.last or self.best is None or row[self.score] >= self.best[self.score]:
            self.best = row
            if trainer.is_global_zero:
                self.save(pl_module.network(weights), row)
        if trainer.is_global_zero:
            with written_aside(self.state_file) as aside:
                trainer.save_checkpoint(aside)
            self.write_history()
        else:
            trainer.save_checkpoint(self.state_file)  # takes part in the barrier, writes nothing
        for logger in trainer.loggers:  # which log on the first process only
            logger.log_metrics({k: v for k, v in row.items() if k not in ("epoch", "weights")}, row["epoch"])
            logger.save()

    def write_history(self) -> None:
        """Write a line for each epoch; anew after a run that was ended between its state and its history."""
        write_text(self.history_file, _as_csv(self.rows))


class Unreadable(Callback):
    """Name each image that cannot be read; more than ``limit`` of them are an error.

    What the other processes met is heard of at the end of an epoch.
    """

    def __init__(self, console: Console, limit: int) -> None:
        self.console = console
        self.limit = limit
        self.messages: dict[str, None] = {}

    def add(self, message: str) -> None:
        """Name an image, once; raises `InputError` at the one beyond the limit."""
        if message in self.messages:
            return
        self.messages[message] = None
        tell(self.console, f"Left out: {message}")
        if len(self.messages) > self.limit:
            raise InputError(
                f"{len(self.messages)} images cannot be read, and {self.limit} may be left out; the last: "
                f"{message} Or allow more (--unreadable)."
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for message in batch.unreadable:
            self.add(message)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:
            met: list[Any] = [None] * trainer.world_size
            all_gather_object(met, list(self.messages))
            for message in chain(*met):
                self.add(message)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        for message in batch.unreadable:
            self.add(message)


class LiveProgress(Callback):
    """A bar over the whole training: images a second, time left, the last epoch's score; else one line an epoch."""

    def __init__(self, console: Console, title: str, keeper: Keeper) -> None:
        self.console = console
        self.progress = progress(console)
        self.title = title
        self.keeper = keeper
        self.task = self.progress.add_task(title, total=None, note="", visible=False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        epoch_images = pl_module.batches * pl_module.batch_images
        if trainer.is_global_zero:
            self.progress.update(
                self.task,
                total=epoch_images * pl_module.recipe.epochs,
                completed=epoch_images * trainer.current_epoch,
                visible=True,
            )
            self.progress.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        self.progress.advance(self.task, pl_module.batch_images)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        row = self.keeper.rows[-1]
        note = f"epoch {row['epoch']}: {row[self.keeper.score]:.1%} held out"
        self.progress.update(self.task, note=note)
        if self.progress.disable and trainer.is_global_zero:
            assert isinstance(pl_module, TrainingModule)
            self.console.print(
                f"epoch {row['epoch']} of {pl_module.recipe.epochs}: loss {row['loss']:.4g}, "
                f"{row[self.keeper.score]:.1%} held out, {row['seconds']:.1f} s",
                highlight=False,
                soft_wrap=True,
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.progress.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.progress.stop()


def _as_csv(rows: list[EpochRow]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
