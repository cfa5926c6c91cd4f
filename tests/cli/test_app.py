# SPDX-License-Identifier: Apache-2.0
"""What all commands have in common."""

from __future__ import annotations

import functools
import inspect
import itertools
import os
from pathlib import Path
from typing import get_type_hints

import pytest
from typer.testing import CliRunner

from vtc.cli import app


def test_home_is_expanded_in_every_path_of_every_command(cli, monkeypatch, tmp_path):
    """`~` after `=` reaches the program as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    checked = set()
    for info in app.registered_commands:
        command, got = info.callback, {}
        name = info.name or command.__name__
        hints = get_type_hints(command)
        paths = [n for n, hint in hints.items() if hint is Path or n in ("model", "config")]
        record = functools.wraps(command)(lambda got=got, **given: got.update(given))
        monkeypatch.setattr(info, "callback", record)
        parameters = inspect.signature(command).parameters
        required = [n for n in parameters if parameters[n].default is inspect.Parameter.empty]
        positional = {"image", "name"}
        for path in paths:
            words = dict.fromkeys(required, "x") | {path: "~/a"}
            options = [w if n in positional else f"--{n}={w}" for n, w in words.items()]
            assert cli(name, *options).exit_code == 0
            assert str(got[path]) == str(tmp_path / "a"), (name, path)
            checked.add((name, path))
    assert {("show", "image"), ("show", "out"), ("show", "model"), ("eval", "out")} <= checked
    assert {("bench", "config"), ("suite", "out"), ("autotune", "model")} <= checked


@pytest.mark.parametrize("command", ["eval", "presets", "bench"])
def test_help_breaks_lines_where_the_terminal_ends(command):
    shown = CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1"}).invoke(app, [command, "--help"])
    said = shown.output.split("╭")[0].splitlines()
    filled = [line.rstrip() for line in said if line.strip() and "Usage: " not in line]
    for line, following in itertools.pairwise(filled):
        if not line.endswith("."):
            assert len(line) + len(following.split()[0]) >= 78, line


@pytest.mark.parametrize(("command", "waits"), [("methods", "passive"), ("bench", None)])
def test_threads_wait_passively_but_for_benchmarks(cli, monkeypatch, command, waits):
    """Before PyTorch is there; on a machine with other work, waiting actively takes four times as
    long."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "x")  # so that it is given back
    monkeypatch.delenv("OMP_WAIT_POLICY")
    cli(*([command] if command == "methods" else [command, "--dtype", "int8"]))
    assert os.environ.get("OMP_WAIT_POLICY") == waits
