# SPDX-License-Identifier: Apache-2.0
"""The program `vtc`: its commands and what they share.

Commands import PyTorch, transformers and lmms-eval only when they need them, so that `--help` and
invalid input answer at once.
"""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from .autotune import autotune
from .bench import bench
from .doctor import doctor
from .eval import evaluate
from .methods import methods
from .models import models
from .presets import presets
from .reproduce import reproduce
from .show import show
from .suite import suite

__all__ = ["app"]

_FOLDERS_OR_IDS = ("model", "config")


class _Command(TyperCommand):
    """A command that expands `~` in every path, also after `--option=`, where shells do not.
    Each warning is printed on its own line."""

    def invoke(self, ctx: Any) -> Any:
        for parameter in self.params:
            name = str(parameter.name)
            value = ctx.params.get(name)
            # Some releases of typer keep paths as text until they call the function.
            kind = getattr(getattr(parameter, "type", None), "name", None)
            if isinstance(value, Path):
                ctx.params[name] = value.expanduser()
            elif (kind == "path" or name in _FOLDERS_OR_IDS) and str(value).startswith("~"):
                ctx.params[name] = str(Path(str(value)).expanduser())
        with warnings.catch_warnings():
            warnings.showwarning = _tell  # type: ignore[assignment]
            return super().invoke(ctx)


def _tell(message: Any, category: type, *where: Any) -> None:
    """Print a warning on its own line, without its place in the code."""
    sys.stderr.write(f"warning: {message}\n")


app = typer.Typer(
    name="vtc",
    help="Compress the vision tokens of Hugging Face vision-language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        from vtc import __version__

        print(__version__)
        raise typer.Exit()


@app.callback()
def main(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compress the vision tokens of Hugging Face vision-language models."""
    # Busy-waiting threads starve one another when another program takes a core: an evaluation took
    # four times as long. Benchmarks are for idle machines.
    if ctx.invoked_subcommand != "bench":
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _add(command: Callable[..., None], name: str | None = None) -> None:
    """Add `command` with its docstring as help; the terminal wraps each paragraph."""
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    help_text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    app.command(name, cls=_Command, help=help_text)(command)


_add(evaluate, "eval")
for _command in (bench, autotune, reproduce, show, methods, models, presets, suite, doctor):
    _add(_command)
