# SPDX-License-Identifier: Apache-2.0
"""`vtc eval`: what it prints and writes, and how it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.eval.evalkit import write_rows


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
        (("--methods", "todre:depth=1"), "--methods", "depth: todre has no such setting"),
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
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "/nosuch/folder"), "no folder /nosuch/folder"),
        (("--device", "tpu9"), "expected cpu, cuda"),
        (("--tasks", "vtc_scene"), "did you mean vtc_scenes"),
        (("--tasks", "vtc_photo"), "set VTC_DATA"),
        (("--out", __file__), "is not a folder"),
    ],
)
@pytest.mark.parametrize("command", ["eval", "autotune"])
def test_what_can_be_told_at_once_is_told_before_lmms_eval_is_imported(
    cli, tmp_path, monkeypatch, command, arguments, message
):
    monkeypatch.setenv("VTC_DATA", str(tmp_path))
    monkeypatch.setattr(
        "vtc.eval.harness.run.import_lmms_eval", lambda: pytest.fail("it was imported")
    )
    result = cli(command, "--out", tmp_path / "new" / "out", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert not any(tmp_path.iterdir())


def test_a_command_that_is_refused_late_leaves_nothing(cli, folder, tmp_path):
    pytest.importorskip("lmms_eval")
    out = tmp_path / "new" / "out"
    arguments = ("eval", "--model", folder, "--model-args", "nosuch=1", "--limit", "1")
    result = cli(*arguments, "--out", out)
    assert result.exit_code == 2
    assert "has no nosuch" in result.output
    assert not any(tmp_path.iterdir())
    # What was there stays.
    (out / "cells").mkdir(parents=True)
    (out / "cells" / "x.json").write_text("{}")
    (out / "mine").write_text("mine")
    assert cli(*arguments, "--out", out).exit_code == 2
    assert (out / "cells" / "x.json").exists()
    assert (out / "mine").exists()


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
    assert "Run the same command again to resume." in stopped.output
    monkeypatch.setattr(Journal, "_append", lambda self, record: written.append(record))
    assert cli(*arguments).exit_code == 0
    assert len(written) == 6
