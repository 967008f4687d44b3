"""Where the numbers of a run go: JSONL and TensorBoard files, and a progress bar or plain lines."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINES_EVERY = 20
"""Steps between plain log lines where there is no terminal for a progress bar."""


def _opened_after(path: Path, step: int) -> TextIO:
    """A JSONL file to append to, without the lines of later steps: a run that is gone on with takes them again."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    # A crash may have torn the last line.
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    path.write_text("".join(kept))
    return path.open("a")


class MetricsLog:
    """Writes every step's numbers on rank 0; on the other ranks it does nothing."""

    def __init__(self, folder: Path, start: int, steps: int, active: bool) -> None:
        self._active, self._steps = active, steps
        if not active:
            return
        from torch.utils.tensorboard.writer import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._jsonl = _opened_after(folder / "metrics.jsonl", start)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start)
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("train", total=steps, completed=start, status="")
            self._bar.start()
        self._began, self._start = time.monotonic(), start

    def write(self, step: int, values: dict[str, float]) -> None:
        """Logs the numbers of a step, counted from 1."""
        if not self._active:
            return
        self._jsonl.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")
        self._jsonl.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        status = f"loss {values['loss']:.4f}  {values['tokens_per_second']:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, status=status)
        elif step % LINES_EVERY == 0 or step == self._steps:
            left = (time.monotonic() - self._began) / (step - self._start) * (self._steps - step)
            self.say(f"step {step}/{self._steps}  {status}  {left:,.0f} s left")

    def say(self, message: str) -> None:
        """A line above the progress bar."""
        if self._active:
            self._console.print(message, highlight=False, markup=False, soft_wrap=True)
            sys.stderr.flush()

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._active:
            if self._bar is not None:
                self._bar.stop()
            self._jsonl.close()
            self._board.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
