# SPDX-License-Identifier: Apache-2.0
"""The command line in this process, and a model for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.eval.evalkit import save_model
from vtc.cli import app


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def cli():
    def invoke(*arguments: object):
        # A wide terminal, so that messages are not broken at words that a test looks for.
        return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(
            app, [str(a) for a in arguments]
        )

    return invoke
