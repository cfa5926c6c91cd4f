# SPDX-License-Identifier: Apache-2.0
"""The command line: what it prints, what it writes, and how it refuses."""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
import warnings
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import vtc
from tests.eval.evalkit import QUESTION, SIDE, TOKENS, picture, save_model, write_rows
from vtc.cli import app
from vtc.core.spec import parse_keep, parse_method, split_list, takes_keep
from vtc.viz import plots
from vtc.viz.trace import trace

ROOT = Path(vtc.__file__).parent.parent


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


# ---- vtc methods, vtc models --------------------------------------------------------------------
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


# ---- vtc eval -----------------------------------------------------------------------------------
def test_eval_prints_a_table_and_writes_results(cli, folder, tmp_path, monkeypatch):
    pytest.importorskip("lmms_eval")

    def build_task(name, out_dir, limit=None, seed=0):
        return write_rows(Path(out_dir) / "built.parquet", ["w1"] * limit)

    monkeypatch.setattr("vtc.eval.tasks.parquet.build_task", build_task)
    arguments = (
        "eval", "--model", folder, "--methods", "fastv:layer=3", "--keep", "4", "--limit", "2",
        "--out", tmp_path,
    )  # fmt: skip
    result = cli(*arguments)
    assert result.exit_code == 0, result.output
    for wanted in ("full", "blind", "random", "pool", "downsample", "fastv:layer=3", "36×3 4×5"):
        assert wanted in result.output
    results = json.loads((tmp_path / "results.json").read_text())
    assert [c["status"] for c in results["cells"]] == ["done"] * 6
    assert Image.open(tmp_path / "tradeoff.png").width > 500
    again = cli(*arguments)
    assert "6 of 6 cells are finished already" in again.output
    # A cell that fails: said in the table, and by the exit code.
    bad = cli(*arguments, "--methods", "fastv:layer=99")
    assert bad.exit_code == 1
    assert "fastv:layer=99" in bad.output
    assert "failed" in bad.output


@pytest.mark.parametrize(
    ("arguments", "option", "message"),
    [
        (("--methods", "fastvv"), "--methods", "unknown name 'fastvv'"),
        (("--methods", "todre:depth=1"), "--methods", "unknown setting 'depth'"),
        (("--methods", "fastv:layer=(1"), "--methods", "brackets"),
        (("--methods", "todre:keep=0.1:keep=0.2"), "--methods", "given twice"),
        (("--keep", "1.5"), "--keep", "a fraction in (0, 1]"),
        (("--keep", "half"), "--keep", "half"),
        (("--limit", "0"), "--limit", "at least 1"),
        (("--dtype", "int8"), "--dtype", "bfloat16"),
        (("--model", "./nowhere"), "--model", "no folder ./nowhere"),
        (("--device", "tpu9"), "--device", "cuda"),
    ],
)
def test_eval_refuses_bad_input_by_name(cli, tmp_path, arguments, option, message):
    pytest.importorskip("lmms_eval")
    result = cli("eval", "--out", tmp_path, *arguments)
    assert result.exit_code == 2
    assert f"Invalid value for {option}" in result.output
    assert message in result.output
    assert not (tmp_path / "results.json").exists()


def test_ctrl_c_says_what_is_kept_and_the_same_command_goes_on(cli, folder, tmp_path, monkeypatch):
    pytest.importorskip("lmms_eval")
    from vtc.eval.harness.journal import Journal

    def build_task(name, out_dir, limit=None, seed=0):
        return write_rows(Path(out_dir) / "built.parquet", ["w1"] * limit)

    monkeypatch.setattr("vtc.eval.tasks.parquet.build_task", build_task)
    written = []
    original = Journal._append

    def append(self, record):
        original(self, record)
        written.append(record)
        if len(written) == 5:
            raise KeyboardInterrupt

    arguments = (
        "eval", "--model", folder, "--methods", "full,blind", "--no-baselines", "--limit", "3",
        "--out", tmp_path, "--no-page",
    )  # fmt: skip
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "_append", append)
        stopped = cli(*arguments)
    assert stopped.exit_code == 130
    kept = "1 finished cells and 2 answers of unfinished ones are kept"
    assert kept in " ".join(stopped.output.split())
    assert "The same command goes on from there." in stopped.output
    monkeypatch.setattr(Journal, "_append", lambda self, record: written.append(record))
    assert cli(*arguments).exit_code == 0
    assert len(written) == 6


def test_suite_refuses_other_tasks(cli, tmp_path):
    result = cli("suite", "pope", "--out", tmp_path)
    assert result.exit_code == 2
    assert "vtc_scenes, vtc_photo, vtc_mosaic" in result.output


# ---- vtc presets --------------------------------------------------------------------------------
def test_presets_say_what_their_target_means(cli):
    result = cli("presets", "fastv", "--target", "llava-1.5")
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.output.splitlines() if line.startswith("fastv")]
    # 64 on average: 576 enter, 30 are left after two layers
    assert ["fastv", "llava-1.5", "average", "64", "576", "64.1", "30"] in [r[:7] for r in rows]
    assert ["fastv", "llava-1.5", "kept", "64", "576", "96.0", "64"] in [r[:7] for r in rows]


@pytest.mark.parametrize(
    ("arguments", "option"),
    [(("nothing",), "METHOD"), (("full",), "METHOD"), (("dart", "--target", "gpt"), "--target")],
)
def test_presets_refuse_what_they_do_not_know(cli, arguments, option):
    result = cli("presets", *arguments)
    assert result.exit_code == 2
    assert f"Invalid value for {option}" in result.output


# ---- vtc show -----------------------------------------------------------------------------------
def test_show_draws_and_answers(cli, folder, tmp_path):
    picture(0).save(tmp_path / "image.png")
    out = tmp_path / "kept.png"
    result = cli(
        "show", tmp_path / "image.png", "--question", QUESTION, "--method", "random|fastv:keep=4",
        "--keep", "0.5", "--model", folder, "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"into the language model: {TOKENS // 2} of {TOKENS} tokens" in result.output
    assert f"before layer 2: 4 of {TOKENS} tokens" in result.output
    assert Image.open(out).width > 500


@pytest.mark.parametrize("method", ["tome", "flowcut|fastv:keep=3"])
def test_show_draws_what_the_tower_left(cli, folder, tmp_path, method):
    picture(0).save(tmp_path / "image.png")
    result = cli(
        "show", tmp_path / "image.png", "--question", QUESTION, "--method", method,
        "--keep", "0.5", "--model", folder, "--out", tmp_path / "kept.png",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"into the language model: {TOKENS // 2} of {TOKENS} tokens" in result.output


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("--method", "nothing"), "--method"),
        (("--keep", "0"), "--keep"),
        (("--method", "full", "--keep", "0.5"), "--keep"),
        (("--model", "./nowhere"), "--model"),
        (("--method", "fastv:layer=9"), "--method"),
        (("--method", "downsample:how=pixels"), "--method"),
        (("--device", "cuda:7"), "--device"),
        (("--device", "nonsense"), "--device"),
    ],
)
def test_show_refuses_bad_input_by_name(cli, tmp_path, arguments, option):
    picture(0).save(tmp_path / "image.png")
    result = cli("show", tmp_path / "image.png", "--question", "why", *arguments)
    assert result.exit_code == 2
    assert f"Invalid value for {option}" in result.output


def test_show_refuses_what_is_no_picture(cli, tmp_path):
    (tmp_path / "image.png").write_text("text")
    for name in ("image.png", "absent.png"):
        result = cli("show", tmp_path / name, "--question", "why")
        assert result.exit_code == 2
        assert "IMAGE" in result.output


def test_show_refuses_damaged_and_oversized_pictures(cli, tmp_path, monkeypatch):
    picture(0).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    result = cli("show", tmp_path / "cut.png", "--question", "why")
    assert result.exit_code == 2
    assert "Invalid value for IMAGE" in result.output
    assert "cut.png: damaged" in result.output
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    result = cli("show", tmp_path / "whole.png", "--question", "why")
    assert result.exit_code == 2
    assert "whole.png: too large, with more than 1,000 pixels" in result.output


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("kept.docx", "expected a file with one of the suffixes"),
        ("kept", "expected a file with one of the suffixes"),
        ("missing/kept.png", "no folder"),
        ("folder.png", "is a folder"),
    ],
)
def test_show_refuses_out_before_the_model_runs(cli, tmp_path, monkeypatch, out, message):
    picture(0).save(tmp_path / "image.png")
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr("vtc.viz.trace.trace", lambda *_: pytest.fail("the model ran"))
    result = cli(
        "show", tmp_path / "image.png", "--question", "why", "--out", tmp_path / out,
    )  # fmt: skip
    assert result.exit_code == 2
    assert "Invalid value for --out" in result.output
    assert message in result.output


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


def test_show_opens_pictures_as_transformers_does(cli, folder, tmp_path, monkeypatch):
    """Turned by EXIF, the drawing and the answer are those of the upright picture."""
    from transformers.image_utils import load_image

    exif = Image.Exif()
    exif[0x0112] = 6
    picture(0).save(tmp_path / "turned.png", exif=exif)
    seen = []
    monkeypatch.setattr("vtc.viz.trace.trace", lambda model, found, *_: seen.append(found) or 1 / 0)
    result = cli("show", tmp_path / "turned.png", "--question", "q")
    assert isinstance(result.exception, ZeroDivisionError)
    upright = np.asarray(load_image(str(tmp_path / "turned.png")))
    assert np.array_equal(np.asarray(seen[0]), upright)
    assert not np.array_equal(upright, np.asarray(picture(0)))


def test_show_says_what_the_processor_crops_and_warns_of_nothing(cli, folder, tmp_path):
    wide = Image.new("RGB", (4 * SIDE, SIDE))
    wide.paste(picture(0), (int(1.5 * SIDE), 0))
    wide.save(tmp_path / "wide.png")
    import matplotlib.pyplot  # noqa: F401  # old releases warn while they are imported

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        result = cli(
            "show", tmp_path / "wide.png", "--question", QUESTION, "--method", "todre",
            "--model", folder, "--out", tmp_path / "kept.png",
        )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "the model sees the middle 25% of its width" in result.output
    found = trace(str(folder), wide, QUESTION, vtc.make("todre"), "cpu", 2)
    shown = np.asarray(found.image, dtype=int)
    assert np.abs(shown - np.asarray(picture(0), dtype=int)).max() <= 1


def test_a_trace_is_of_the_tokens_the_method_chose(folder):
    method = vtc.make("random", keep=10, seed=3)
    found = trace(str(folder), picture(1), QUESTION, method, "cpu", 4)
    drawn = _random_places(10, seed=3)
    assert found.grid == (6, 6)
    assert found.kept == {"into the language model": drawn}
    assert found.answer != found.answer_full
    # The picture that is drawn on is what the tower was shown: here the whole picture.
    shown = np.asarray(found.image, dtype=int)
    assert found.image.size == (SIDE, SIDE)
    assert np.abs(shown - np.asarray(picture(1), dtype=int)).max() <= 1


def _random_places(keep: int, seed: int) -> list[int]:
    """What `Random` keeps of an image's tokens, asked directly."""
    import torch

    from vtc.core import VisionTokens

    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")
    grid = torch.stack([torch.zeros(36, dtype=torch.long), rows.flatten(), columns.flatten()], 1)
    tokens = VisionTokens(features=torch.zeros(36, 4), grid=grid)
    return vtc.make("random", keep=keep, seed=seed).select(tokens).indices.tolist()


def test_a_trace_follows_a_composition(folder):
    method = vtc.make("random", keep=12) | vtc.make("random", keep=5) | vtc.make("fastv", keep=2)
    found = trace(str(folder), picture(1), QUESTION, method, "cpu", 4)
    first, last = found.kept.values()
    assert list(found.kept) == ["into the language model", "before layer 2"]
    assert (len(first), len(last)) == (5, 2)
    assert set(last) < set(first) < set(_random_places(12, seed=0))


# ---- methods as text ----------------------------------------------------------------------------
def test_lists_are_split_outside_of_brackets():
    assert split_list("a:x=[1,2], b ,c:y=(3,4)") == ["a:x=[1,2]", "b", "c:y=(3,4)"]
    assert split_list(" ") == []
    for text in ("a,", ",a", "a, ,b"):
        with pytest.raises(ValueError, match="both sides of each ','"):
            split_list(text)
    for text in ("a[", "a]", "a](["):
        with pytest.raises(ValueError, match="brackets"):
            split_list(text)


def test_keep_is_a_fraction_or_a_number():
    kept = [parse_keep(text) for text in ("0.25", "1.0", "1", "64")]
    assert kept == [0.25, 1.0, 1, 64]
    assert [type(k) for k in kept] == [float, float, int, int]
    for text in ("0", "-3", "0.0", "1.5", "nan", "many", ""):
        with pytest.raises(ValueError, match="keep"):
            parse_keep(text)


def test_methods_as_text():
    method = parse_method("fastv:layer=3:positions=contiguous", 0.3)
    assert method == vtc.make("fastv", layer=3, positions="contiguous", keep=0.3)
    assert parse_method("random:keep=5", seed=4) == vtc.make("random", keep=5, seed=4)
    assert takes_keep("random")
    assert not takes_keep("random:keep=5")
    assert not takes_keep("full")
    assert takes_keep("random:keep=5|fastv")
    with pytest.raises(TypeError, match="keep"):
        parse_method("full", keep=0.5)


# ---- pictures -----------------------------------------------------------------------------------
def _drawn_cell(label, keep, tokens, score):
    return {
        "task": "t", "label": label, "keep": keep, "status": "done", "metric": "exact_match",
        "score": score, "interval": [score - 0.1, score + 0.1], "tokens": {"equivalent": tokens},
    }  # fmt: skip


def test_the_tradeoff_has_a_line_for_each_method():
    cells = [
        _drawn_cell("full", None, 576, 0.8), _drawn_cell("blind", None, 576, 0.3),
        _drawn_cell("todre", 0.25, 144, 0.7), _drawn_cell("todre", 0.1, 58, 0.6),
        _drawn_cell("random", 0.1, 58, 0.5),
        {"task": "t", "label": "fastv", "keep": 0.1, "status": "failed", "error": "no"},
    ]  # fmt: skip
    figure = plots.tradeoff({"cells": cells})
    (axes,) = figure.axes
    lines = {c.get_label(): c for c in axes.containers}
    assert set(lines) == {"todre", "random"}
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["todre", "random"]
    x, y = lines["todre"][0].get_data()
    assert list(y) == pytest.approx([60, 70])
    assert list(x) == pytest.approx([58, 144], rel=0.08)  # nudged apart, but not far
    levels = {line.get_ydata()[0] for line in axes.lines if len(set(line.get_ydata())) == 1}
    assert {80.0, 30.0} <= levels
    colours = {lines[label][0].get_color() for label in lines}
    assert len(colours) == 2
    with pytest.raises(ValueError, match="no finished cell"):
        plots.tradeoff({"cells": cells[-1:]})


def test_kept_cells_are_drawn_as_they_are_and_others_darkened():
    image = Image.new("RGB", (60, 60), (200, 100, 50))
    figure = plots.kept_tokens(image, (3, 3), {"a": [0, 4], "b": []})
    shown = [np.asarray(ax.images[0].get_array()) for ax in figure.axes if ax.images]
    assert len(shown) == 3
    assert (shown[0] == (200, 100, 50)).all()
    first = shown[1].reshape(3, 20, 3, 20, 3).mean((1, 3))
    kept = (first == (200, 100, 50)).all(-1)
    assert kept.tolist() == [[True, False, False], [False, True, False], [False, False, False]]
    assert shown[2].max() < 100
    with pytest.raises(ValueError, match="0 to 8, got 0 to 9"):
        plots.kept_tokens(image, (3, 3), [0, 9])
    with pytest.raises(ValueError, match="at least one"):
        plots.kept_tokens(image, (3, 3), {})


@pytest.mark.parametrize(("command", "waits"), [("methods", "passive"), ("bench", None)])
def test_threads_wait_passively_but_for_benchmarks(cli, monkeypatch, command, waits):
    """Before PyTorch is there; on a machine with other work, waiting actively takes four times as
    long."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "x")  # so that it is given back
    monkeypatch.delenv("OMP_WAIT_POLICY")
    cli(*([command] if command == "methods" else [command, "--dtype", "int8"]))
    assert os.environ.get("OMP_WAIT_POLICY") == waits
