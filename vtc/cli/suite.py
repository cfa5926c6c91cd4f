# SPDX-License-Identifier: Apache-2.0
"""`vtc suite`: write a generated task as files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import output
from .options import fail


def suite(
    name: Annotated[str, typer.Argument(help="vtc_scenes, vtc_photo or vtc_mosaic.")],
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Number of samples.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write a task of vtc's own suite: parquet and task file, for lmms-eval's --include_path."""
    from vtc.eval.harness.run import OWN_TASKS, write_task

    if name not in OWN_TASKS:
        from vtc.core.names import unknown

        raise fail("NAME", unknown(name, OWN_TASKS))
    output().print(str(write_task(name, out, limit, seed)))
