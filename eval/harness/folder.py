# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: check that it is writable, and clean up after a refused run."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from . import parallel
from .plan import BadInput

__all__ = ["REMEMBERED", "check_out", "prepared"]

REMEMBERED = "fingerprints.json"
"""File in a run's folder with hashes of large files, so that not every run reads a checkpoint."""


def check_out(out: Path) -> None:
    """Refuse a folder that cannot be written to; it need not exist yet.

    Raises:
        BadInput: for --out.
    """
    there = next(path for path in (out, *out.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise BadInput("--out", f"{out}: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise BadInput("--out", f"{out}: no permission to write to {there}")


@contextlib.contextmanager
def prepared(out: Path, log: Path) -> Iterator[None]:
    """Make the folder with its `cells/`; if the run is refused within the block, remove what it
    made, except finished cells and their files.

    Args:
        out: the folder.
        log: this process's log file in it.

    Raises:
        BadInput: the folder cannot be made, or the run is refused.
    """
    made = [path for path in (out, *out.parents) if not path.exists()]
    names = ("data", "journal", REMEMBERED)
    fresh = [out / name for name in names if not (out / name).exists()]
    cells = out / "cells"
    whole = not cells.exists()
    own_log = not log.exists()
    try:
        cells.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput("--out", f"{out}: {error.strerror}") from error
    try:
        yield
    except BadInput:
        with contextlib.suppress(OSError):
            empty = whole and (not cells.exists() or not any(cells.iterdir()))
            if empty and own_log:
                log.unlink(missing_ok=True)
            if empty and parallel.rank() == 0:
                for path in (cells, *fresh):
                    _remove(path)
                for path in made:  # with several processes the last one finds it empty
                    path.rmdir()
        raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
