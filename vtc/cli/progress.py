# SPDX-License-Identifier: Apache-2.0
"""The progress bar, and the message of an interrupted run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from .console import error_console

if TYPE_CHECKING:
    from rich.progress import Progress

    from vtc.eval.harness.run import Observer

__all__ = ["bar", "kept", "observer", "stopped"]


def bar() -> Progress:
    """A progress bar on the error stream, so that results can be piped; on the stream itself, as
    `sys.stderr` is redirected while lmms-eval runs."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as TimeRemaining

    # lmms-eval's own output is redirected already; rich must not redirect it again.
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemaining(),
        console=error_console(),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )


def observer(
    progress: Progress, measured: Callable[[Mapping[str, Any]], None] | None = None
) -> Observer:
    """The observer that moves the bar of `progress`; `measured` receives rows of `vtc bench`."""
    from vtc.eval.harness.run import Observer

    class Bar(Observer):
        def __init__(self) -> None:
            self.bar = progress.add_task("starting", total=None)

        def planned(self, total: int, cells: int, finished: int) -> None:
            progress.update(self.bar, total=total)
            if finished:
                progress.console.print(f"{finished} of {cells} cells are finished already")

        def stage(self, text: str) -> None:
            progress.update(self.bar, description=text)

        def advanced(self, samples: int) -> None:
            progress.advance(self.bar, samples)

        def finished(self, cell: Mapping[str, Any]) -> None:
            if not progress.console.is_terminal:  # it shows no bar
                progress.console.print(f"{cell['label']}: {cell['status']}", markup=False)
            for warning in cell.get("warnings", ()):
                progress.console.print(f"{cell['label']}: {warning}", style="yellow")
            if cell["status"] != "done":
                progress.console.print(f"{cell['label']} failed: {cell['error']}", style="red")

        def measured(self, results: Mapping[str, Any]) -> None:
            if measured is None:
                return
            # The output must not start on the bar's line.
            progress.stop()
            try:
                measured(results)
            finally:
                progress.start()

    return Bar()


def stopped(message: str) -> NoReturn:
    """Print what an interrupted run keeps, and exit with code 130."""
    error_console().print(message, markup=False, soft_wrap=True)
    raise typer.Exit(130)


def kept(out: Path) -> str:
    """What an interrupted run of `vtc eval` keeps."""
    from vtc.eval.harness.journal import answers_in

    cells = sum(
        1 for file in (out / "cells").glob("*.json") if file.with_suffix(".jsonl").is_file()
    )
    answers = answers_in(out / "journal")
    return (
        f"stopped: {cells} finished cells and {answers} answers of unfinished ones are kept in "
        f"{out}. Run the same command again to resume."
    )
