# SPDX-License-Identifier: Apache-2.0
"""Names with a typing error: what may have been meant is said, in Python as on the command line."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner
from vtc.eval.harness.reproduce import load_tables
from vtc.eval.harness.suites import expand

import vtc
from vtc.cli import app
from vtc.core.names import unknown
from vtc.core.spec import parse_method


@pytest.mark.parametrize(
    ("call", "meant"),
    [
        (lambda: vtc.make("todree"), "todre"),
        (lambda: vtc.make("Vision-Zip"), "visionzip"),
        (lambda: vtc.make("pyramid_drop"), "pyramiddrop"),
        (lambda: vtc.make("fastv", keeps=0.5), "keep"),
        (lambda: vtc.make({"method": "fasttv"}), "fastv"),
        (lambda: parse_method("random|fastvv"), "fastv"),
        (lambda: parse_method("todre:second_stge=false"), "second_stage"),
        (lambda: vtc.preset("visionzp", "llava-1.5", 64), "visionzip"),
        (lambda: vtc.preset("fastv", "llava1.5", 64), "llava-1.5"),
        (lambda: vtc.preset("fastv", "llava-1.5", 64, lyer=3), "layer"),
        (lambda: vtc.presets("fatsv"), "fastv"),
        (lambda: expand("images"), "image"),
        (lambda: load_tables("llava-1.5-7"), "llava-1.5-7b"),
    ],
)
def test_errors_say_what_may_have_been_meant(call, meant: str) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    hint = str(error.value).partition("did you mean ")[2].partition("?")[0]
    assert hint.split(" or ")[0] == meant


@pytest.mark.parametrize(
    ("arguments", "option", "meant"),
    [
        (("show", "x.png", "--question", "q", "--method", "todr"), "--method", "todre"),
        (("presets", "visionzpi"), "METHOD", "visionzip"),
        (("presets", "fastv", "--target", "llava-nex"), "--target", "llava-next"),
        (("suite", "vtc_scene", "--out", "unused"), "NAME", "vtc_scenes"),
        (("reproduce", "llava-1.5-7"), "NAME", "llava-1.5-7b"),
        (("eval", "--suite", "docs"), "--suite", "doc"),
    ],
)
def test_commands_say_it_too(arguments: tuple[str, ...], option: str, meant: str) -> None:
    result = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, arguments)
    assert result.exit_code == 2
    assert f"Invalid value for {option}" in result.output
    assert f"did you mean {meant}" in result.output


def test_what_is_like_nothing_gets_the_list() -> None:
    assert unknown("xyz", ["a", "b"]) == "unknown name 'xyz'; known are a, b"
    assert unknown(5, ["a"]) == "unknown name 5; known are a"
