# SPDX-License-Identifier: Apache-2.0
"""`vtc methods`, `vtc models` and `vtc presets`: what they list, on narrow terminals as well."""

from __future__ import annotations

import itertools
import re

import pytest
from typer.testing import CliRunner

import vtc
from vtc.cli import app


def test_methods_lists_every_method_with_its_settings(cli):
    result = cli("methods")
    assert result.exit_code == 0
    entries = {e.split("\n")[0]: e for e in re.split(r"\n(?=\w)", result.output)}
    for name, cls in vtc.methods().items():
        assert cls.title in " ".join(entries[name].split())
        assert cls.paper in entries[name]
    assert "keep=0.5, layer=2" in result.output
    assert "reads" not in entries["divprune"]
    assert "reads: decoder attention" in entries["fastv"]
    assert "cls_attention" in entries["holov"]


def test_models_lists_every_family(cli):
    result = cli("models")
    assert result.exit_code == 0
    page = cli("models", "--markdown")  # where cells do not fold over lines
    assert page.exit_code == 0
    for family in vtc.models():
        assert f"**{family.name}**" in page.output
        shown = family.name if family.model_types else "any other"
        assert shown in result.output


@pytest.mark.parametrize("columns", ["80", "60"])
@pytest.mark.parametrize("command", ["methods", "models", "presets"])
def test_lists_fit_a_narrow_terminal(command, columns):
    """No line is longer, no name, number or setting is broken."""
    result = CliRunner(env={"COLUMNS": columns, "NO_COLOR": "1"}).invoke(app, [command])
    assert result.exit_code == 0
    # The figures of presets stand in one line of 80, the names of families in one of theirs.
    most = max(int(columns), 80 if command != "methods" else 0)
    assert max(len(line.rstrip()) for line in result.output.splitlines()) <= most
    wide = CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1"}).invoke(app, [command, "--wide"])
    body = "\n".join(wide.output.splitlines()[2:])  # without headers
    assert words_of(body) <= words_of(result.output)


def words_of(text):
    """Names, numbers and settings of some length."""
    return set(re.findall(r"[\w.=:/-]{4,}", text))


def test_wide_lists_have_one_line_a_row(cli):
    for command, count in (("methods", len(vtc.methods())), ("presets", len(vtc.presets()))):
        lines = cli(command, "--wide").output.splitlines()
        names = [line.split()[0] for line in lines[2:] if line and line[0].islower()]
        assert len([n for n in names if n in vtc.methods()]) == count


def test_presets_say_what_their_target_means(cli):
    result = cli("presets", "fastv", "--target", "llava-1.5")
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.output.splitlines() if line.startswith("fastv")]
    # 64 on average: 576 enter, 30 are left after two layers
    assert ["fastv", "llava-1.5", "average", "64", "576", "64.1", "30"] in [r[:7] for r in rows]
    assert ["fastv", "llava-1.5", "kept", "64", "576", "96.0", "64"] in [r[:7] for r in rows]


def test_presets_explain_their_words(cli):
    from vtc.presets.table import TABLE

    for arguments in ((), ("--wide",), ("--help",)):
        shown = " ".join(cli("presets", *arguments).output.split())
        for convention in {row.convention for row in TABLE}:
            assert f"{convention}: " in shown
        assert "enter, mean" in shown
        assert "what the target counts" in shown or "What a target counts" in shown


def test_presets_say_of_each_target_where_it_is_from(cli):
    lines = cli("presets", "fastv", "--target", "llava-1.5").output.splitlines()
    below = {tuple(a.split()[2:4]): b for a, b in itertools.pairwise(lines)}
    assert below["kept", "288"].endswith("; paper")
    assert below["kept", "192"].endswith("; tables of others")


def test_all_tokens_are_not_written_as_one(cli):
    """`keep=1` is one token, and `keep=1.0` are all."""
    assert "keep=1.0, " in cli("methods").output
    assert not re.search(r"keep=1\b(?!\.)", cli("methods").output)


@pytest.mark.parametrize(
    ("arguments", "option"),
    [(("nothing",), "METHOD"), (("full",), "METHOD"), (("dart", "--target", "gpt"), "--target")],
)
def test_presets_refuse_what_they_do_not_know(cli, arguments, option):
    result = cli("presets", *arguments)
    assert result.exit_code == 2
    assert f"Invalid value for {option}" in result.output
