# SPDX-License-Identifier: Apache-2.0
"""The bar that moves while a run goes on, and what is said of one that was stopped."""

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
    """A bar on the error stream, so that what is printed in the end can be piped alone; on the
    stream itself, as `sys.stderr` is redirected while lmms-eval talks."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as TimeRemaining

    # lmms-eval's own output is redirected meanwhile; rich must not redirect it once more.
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
    """Who moves the bar of `progress`; `measured` is called with rows of `vtc bench`."""
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
            if not progress.console.is_terminal:  # no bar moves there
                progress.console.print(f"{cell['label']}: {cell['status']}", markup=False)
            for warning in cell.get("warnings", ()):
                progress.console.print(f"{cell['label']}: {warning}", style="yellow")
            if cell["status"] != "done":
                progress.console.print(f"{cell['label']} failed: {cell['error']}", style="red")

        def measured(self, results: Mapping[str, Any]) -> None:
            if measured is None:
                return
            # What is printed must not begin in the line that the bar is in.
            progress.stop()
            try:
                measured(results)
            finally:
                progress.start()

    return Bar()


def stopped(message: str) -> NoReturn:
    """Say what Ctrl-C left behind, and end as shells expect it."""
    error_console().print(message, markup=False, soft_wrap=True)
    raise typer.Exit(130)


def kept(out: Path) -> str:
    """How far a run of `vtc eval` came that was stopped."""
    from vtc.eval.harness.journal import answers_in

    cells = sum(
        1 for file in (out / "cells").glob("*.json") if file.with_suffix(".jsonl").is_file()
    )
    answers = answers_in(out / "journal")
    return (
        f"stopped: {cells} finished cells and {answers} answers of unfinished ones are kept in "
        f"{out}. The same command goes on from there."
    )
