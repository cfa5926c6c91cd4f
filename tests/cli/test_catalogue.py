# SPDX-License-Identifier: Apache-2.0
"""`vtc methods` reads a file, which must say what the classes say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vtc.cli import catalogue


def test_the_file_says_what_the_classes_say() -> None:
    assert catalogue._written() is not None, "run `make catalogue`"
    assert catalogue.catalogue() == catalogue.catalogue(live=True)


@pytest.mark.parametrize("left", [None, "{", '{"digest": "of before", "methods": []}'])
def test_a_file_that_is_not_current_is_not_read(
    left: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, current = tmp_path / "catalogue.json", catalogue.catalogue()
    if left is not None:
        file.write_text(left, "utf-8")
    monkeypatch.setattr(catalogue, "_FILE", file)
    assert catalogue._written() is None
    assert catalogue.catalogue() == current
    catalogue.write()
    assert catalogue._written() is not None


def test_lint_checks_the_file() -> None:
    """Before any test runs: an edit of a method makes the file out of date."""
    make = (Path(__file__).parents[2] / "Makefile").read_text("utf-8")
    assert "-m vtc.cli.catalogue --check" in make
    command = [sys.executable, "-m", "vtc.cli.catalogue", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
