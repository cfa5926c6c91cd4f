# SPDX-License-Identifier: Apache-2.0
"""`vtc eval` when things go wrong: killed, on a full disk, with a broken image or method."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from tests.eval.evalkit import save_model, write_rows

pytest.importorskip("lmms_eval")

from vtc.eval.harness import prefills
from vtc.eval.harness import run as runner
from vtc.eval.harness.identity import FileHashes, digest
from vtc.eval.harness.journal import Journal, SampleError
from vtc.eval.harness.results import of_this_run
from vtc.eval.tasks import parquet

from vtc.cli import app
from vtc.core.prefill import ImageTokens, Prefill, Sample, Stopwatch
from vtc.report import Report

ROWS = 4

# `vtc` that counts its calls of `generate` in a file. It may fill the disk at one of them, and
# makes room at the first that finds the answer of the one before not written.
COUNTED = """
import os, sys
from pathlib import Path
from transformers import GenerationMixin

count, fill_at = Path(sys.argv[1]), int(sys.argv[2])
del sys.argv[1:3]
original, filler, written = GenerationMixin.generate, Path("filler"), []

def generate(*args, **kwargs):
    with count.open("ab", buffering=0) as file:
        file.write(b".")
    written.append(sum(f.read_bytes().count(b"\\n") for f in Path("out/journal").glob("*")))
    if filler.exists() and written[-1] == written[-2]:
        filler.unlink()
    if count.stat().st_size == fill_at:
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
    return original(*args, **kwargs)

GenerationMixin.generate = generate
from vtc.cli import app
app()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _small_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    def build_task(name: str, out: Any, limit: int | None = None, seed: int = 0) -> Path:
        return write_rows(Path(out) / "built.parquet", ["never"] * (limit or ROWS))

    monkeypatch.setattr("vtc.eval.tasks.parquet.build_task", build_task)
    monkeypatch.setattr(runner, "hub_answers", lambda: False)


def _evaluate(folder: Path, out: Path, *options: str) -> tuple[int, list[dict[str, Any]], str]:
    """`vtc eval` in this process: (exit code, cells, what was printed)."""
    command = ["eval", "--model", str(folder), "--out", str(out), "--no-baselines", "--no-page"]
    done = CliRunner(env={"COLUMNS": "300"}).invoke(app, [*command, "--keep", "4", *options])
    cells = json.loads((out / "results.json").read_text())["cells"]
    return done.exit_code, cells, done.output


def _same(cell: dict[str, Any]) -> dict[str, Any]:
    """What of a cell a second run must repeat: all but times."""
    return {k: v for k, v in cell.items() if k not in ("ms", "seconds")}


# ---- killed -------------------------------------------------------------------------------------
def _counted(out: Path, count: Path, limit: int, fill_at: int = 0) -> list[str]:
    return [
        sys.executable, "-c", COUNTED, str(count), str(fill_at), "eval", "--methods",
        "divprune,random", "--keep", "0.1", "--limit", str(limit), "--no-baselines", "--no-page",
        "--out", str(out),
    ]  # fmt: skip


def _kill_after(command: list[str], count: Path, calls: int, log: Path) -> None:
    """Start, and SIGKILL once `generate` was called so often, counted from the first start."""
    with log.open("a") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        deadline = time.monotonic() + 400
        while process.poll() is None and time.monotonic() < deadline:
            if count.exists() and count.stat().st_size >= calls:
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, log.read_text()[-2000:]


@pytest.mark.slow
def test_a_killed_run_loses_at_most_the_sample_in_flight(tmp_path: Path) -> None:
    limit, kills = 6, (3, 10)  # in the middle of the first and of the second cell
    out, count = tmp_path / "killed", tmp_path / "count"
    for calls in kills:
        _kill_after(_counted(out, count, limit), count, calls, tmp_path / "log")
    assert not (out / "results.json").exists() or len(_cells(out)) == 1
    before = count.stat().st_size
    done = subprocess.run(
        _counted(out, count, limit), capture_output=True, text=True, check=False, timeout=400
    )
    assert done.returncode == 0, done.stderr[-2000:]
    calls = count.stat().st_size
    assert 2 * limit <= calls <= 2 * limit + len(kills)  # each kill cost one sample at most
    assert calls - before < limit  # and the last start asked for those that were left

    plain, other = tmp_path / "plain", tmp_path / "other"
    subprocess.run(_counted(plain, other, limit), check=True, capture_output=True, timeout=400)
    assert other.stat().st_size == 2 * limit
    assert [_same(c) for c in _cells(out)] == [_same(c) for c in _cells(plain)]
    for cell in _cells(plain):
        name = f"cells/{cell['key']}.jsonl"
        assert (out / name).read_text() == (plain / name).read_text()
    assert not list((out / "journal").iterdir())


def _cells(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / "results.json").read_text())["cells"]
    return found


class _Killed(BaseException):
    """Ends a run where it is, as a signal would, but in this process."""


@pytest.mark.parametrize("torn", [False, True])
def test_the_journal_is_taken_up(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: bool
) -> None:
    class Killer(runner.Observer):
        samples = 0

        def advanced(self, samples: int) -> None:
            self.samples += samples
            if self.samples == 3:
                raise _Killed

    def settings(name: str, **changes: Any) -> runner.Settings:
        given = {"methods": ("divprune",), "keeps": (4,), "baselines": False, **changes}
        return runner.Settings(out=tmp_path / name, model=str(folder), **given)

    undisturbed = runner.run(settings("plain"))["cells"]
    with pytest.raises(_Killed):
        runner.run(settings("killed"), Killer())
    (file,) = (tmp_path / "killed" / "journal").iterdir()
    lines = file.read_bytes().splitlines(keepends=True)
    assert len(lines) == 2
    if torn:
        file.write_bytes(lines[0] + lines[1][: len(lines[1]) // 2])
    asked = _counting(monkeypatch)
    # Another seed is another cell, and takes nothing from this one's journal.
    runner.run(settings("killed", seed=1))
    assert len(asked) == ROWS
    resumed = of_this_run(runner.run(settings("killed")))
    assert len(asked) == ROWS + (3 if torn else 2)
    assert [_same(c) for c in resumed] == [_same(c) for c in undisturbed]
    assert not list((tmp_path / "killed" / "journal").iterdir())


def _counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    from transformers import GenerationMixin

    asked: list[int] = []
    original = GenerationMixin.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        asked.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "generate", generate)
    return asked


class _Request:
    """What the journal reads of lmms-eval's `Instance`."""

    task_name, idx = "t", 0

    def __init__(self, doc_id: int, text: str, **settings: Any) -> None:
        self.doc_id, self.args = doc_id, (text, settings, print)


def _asker(asked: list[list[int]]) -> Any:
    def ask(requests: list[Any]) -> list[str]:
        asked.append([r.doc_id for r in requests])
        return [f"answer {r.doc_id}" for r in requests]

    return ask


def test_batches_are_taken_whole(tmp_path: Path) -> None:
    """After a restart the batches are the same, though some are answered already."""
    requests = [_Request(i, "x" * n) for i, n in enumerate((1, 5, 3, 4, 2))]
    report, asked = Report(None), []
    first = Journal(tmp_path, "k", batch=2).answers("g", requests, _asker(asked), report)
    assert [a.text for a in first] == [f"answer {i}" for i in range(5)]
    assert asked == [[1, 3], [2, 4], [0]]  # the longest together
    path = tmp_path / "k.0.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:1]))
    again: list[list[int]] = []
    second = Journal(tmp_path, "k", batch=2).answers("g", requests, _asker(again), report)
    assert again == [[2, 4], [0]]
    assert second == first
    # Another prompt or setting is another request, and so is the same one asked once more.
    again.clear()
    others = [_Request(1, "y"), _Request(1, "x", top_p=1), *[_Request(0, "x")] * 2]
    Journal(tmp_path, "k").answers("g", others, _asker(again), report)
    assert again == [[1], [1], [0]]  # of batches of one, the last is there


def test_a_torn_line_is_cut_off(tmp_path: Path) -> None:
    """Or the next one would be glued to it, and both be lost at the next start."""
    requests = [_Request(i, "x") for i in range(3)]
    report, asked = Report(None), []
    Journal(tmp_path, "k").answers("g", requests[:2], _asker(asked), report)
    path = tmp_path / "k.0.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    Journal(tmp_path, "k").answers("g", requests, _asker(asked), report)
    assert asked == [[0], [1], [1], [2]]
    Journal(tmp_path, "k").answers("g", requests, _asker(asked), report)
    assert len(asked) == 4


@pytest.mark.parametrize("line", [b"null", b"{}", b'{"names": ["a"], "answers": []}', b"[1]"])
def test_a_line_that_is_no_record_is_asked_again(tmp_path: Path, line: bytes) -> None:
    requests = [_Request(i, "x") for i in range(2)]
    report, asked = Report(None), []
    Journal(tmp_path, "k").answers("g", requests[:1], _asker(asked), report)
    path = tmp_path / "k.0.jsonl"
    path.write_bytes(path.read_bytes() + line + b"\n")
    found = Journal(tmp_path, "k").answers("g", requests, _asker(asked), report)
    assert asked == [[0], [1]]
    assert [a.text for a in found] == ["answer 0", "answer 1"]
    Journal(tmp_path, "k").answers("g", requests, _asker(asked), report)
    assert len(asked) == 2


def test_another_number_of_answers_is_not_written_down(tmp_path: Path) -> None:
    """Or every later start would fail as well, with the cause mended."""
    requests, asked = [_Request(i, "x") for i in range(2)], []
    journal = Journal(tmp_path, "k", batch=2)
    with pytest.raises(SampleError, match="1 answers to 2 requests"):
        journal.answers("g", requests, lambda mine: ["one"], Report(None))
    assert not (tmp_path / "k.0.jsonl").exists()
    found = journal.answers("g", requests, _asker(asked), Report(None))
    assert [a.text for a in found] == ["answer 0", "answer 1"]


def test_batches_hold_one_setting(tmp_path: Path) -> None:
    requests = [_Request(i, "x", top_p=i % 2) for i in range(6)]
    asked: list[list[int]] = []
    Journal(tmp_path, "k", batch=2).answers("g", requests, _asker(asked), Report(None))
    assert asked == [[0, 2], [4], [1, 3], [5]]


def test_another_process_s_journal_is_read(tmp_path: Path) -> None:
    requests = [_Request(i, "x") for i in range(4)]
    report, asked = Report(None), []
    Journal(tmp_path, "k", process=1).answers("g", requests[1::2], _asker(asked), report)
    theirs = tmp_path / "k.1.jsonl"
    theirs.write_bytes(theirs.read_bytes() + b'{"names"')  # it died here; not ours to mend
    mine = Journal(tmp_path, "k")
    mine.answers("g", requests, _asker(asked), report)
    assert asked == [[1], [3], [0], [2]]
    assert theirs.read_bytes().endswith(b'{"names"')
    mine.remove()
    assert not list(tmp_path.iterdir())


def test_prefills_come_back_as_they_were() -> None:
    clocks = [Stopwatch() for _ in range(4)]
    for clock in clocks:
        with clock.measure(torch.device("cpu")):
            time.sleep(0.001)
    image = ImageTokens(36, 30, ((0, 30), (2, 4)), 8, passed=(40, 30))
    prefill = Prefill([Sample(5, (image,), (35, 35, 9))], 2, *clocks)
    back = prefills.from_json(json.loads(json.dumps(prefills.to_json(prefill))))
    assert (back.samples, back.bytes_per_value) == (prefill.samples, 2)
    for name in ("vision_ms", "selector_ms", "lm_ms"):
        assert getattr(back, name) == getattr(prefill, name)
    assert back.selector_ms > 1


# ---- a full disk --------------------------------------------------------------------------------
def test_a_full_disk_fails_its_cell_only(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's own error: the first cell's journal is /dev/full."""
    original, seen = Journal.__init__, []

    def full_at_first(self: Journal, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if not seen:
            self.path = Path("/dev/full")
        seen.append(self)

    monkeypatch.setattr(Journal, "__init__", full_at_first)
    code, (bad, good), output = _evaluate(folder, tmp_path, "--methods", "divprune,random")
    assert code == 1
    assert (bad["status"], good["status"]) == ("failed", "done")
    assert "No space left on device" in bad["error"]
    assert "No space left on device" in output
    assert good["samples"] == ROWS


def test_results_that_cannot_be_written_are_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full for good: nothing half-written is left, and what failed is said."""
    original = os.fsync

    def full(file: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("os.fsync", full)
    command = ["eval", "--model", str(folder), "--out", str(tmp_path), "--methods", "divprune"]
    command += ["--keep", "4", "--no-baselines", "--no-page"]
    done = CliRunner(env={"COLUMNS": "900"}).invoke(app, command)
    assert done.exit_code == 2
    assert "the results could not be written" in done.output
    assert "divprune keep 4: OSError" in done.output
    assert not (tmp_path / "results.json").exists()
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".")]
    # Once there is room, the answers are taken from the journal.
    monkeypatch.setattr("os.fsync", original)
    asked = _counting(monkeypatch)
    code, (cell,), _ = _evaluate(folder, tmp_path, "--methods", "divprune")
    assert (code, cell["status"], asked) == (0, "done", [])
    assert cell["tokens"]["out"] == 4  # nothing ran; the figures are the journal's too
    assert cell["flops"]["total"] > 0
    assert all(ms > 0 for ms in cell["ms"].values())


def _can_mount() -> bool:
    script = "mount -t tmpfs -o size=1m none /mnt"
    try:
        return subprocess.run(["unshare", "-m", "sh", "-c", script], check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not _can_mount(), reason="needs to mount a small disk")
def test_a_disk_that_is_full_for_a_while(tmp_path: Path) -> None:
    """The disk fills up in the first cell and is free again in the second; then all is run."""
    limit, count = 12, tmp_path / "count"

    def vtc(fill_at: int) -> str:
        return shlex.join(_counted(Path("out"), count, limit, fill_at))

    disk = tmp_path / "disk"
    disk.mkdir()
    script = f"""
        mount -t tmpfs -o size=6m none {shlex.quote(str(disk))} || exit 9
        cd {shlex.quote(str(disk))}
        {vtc(3)} > {tmp_path}/log 2>&1; echo $?; cp out/results.json {tmp_path}/1.json
        {vtc(0)} > {tmp_path}/log2 2>&1; echo $?; cp out/results.json {tmp_path}/2.json
    """
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, check=False,
        timeout=500,
    )  # fmt: skip
    log = (tmp_path / "log").read_text()[-1500:]
    assert done.stdout.split() == ["1", "0"], log
    first = json.loads((tmp_path / "1.json").read_text())["cells"]
    assert [c["status"] for c in first] == ["failed", "done"], log
    assert "No space left on device" in first[0]["error"]
    second = json.loads((tmp_path / "2.json").read_text())["cells"]
    assert [(c["status"], c["samples"]) for c in second] == [("done", limit)] * 2
    # Of the failed cell only the sample that could not be written was asked twice, if any.
    assert 2 * limit <= count.stat().st_size <= 2 * limit + 1


# ---- other people's mistakes --------------------------------------------------------------------
def test_an_unreadable_image_fails_its_cells_only(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data" / f"vtc_scenes-{ROWS}-0"
    data.mkdir(parents=True)
    file = write_rows(data / "vtc_scenes.parquet", ["never"] * ROWS)
    table = pq.read_table(file)
    rows = table.to_pylist()
    rows[2]["image"]["bytes"] = rows[2]["image"]["bytes"][:20] + b"torn"
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), file)
    # As if it had been generated so; other data would be replaced.
    identity = digest([ROWS, 0, parquet.identity("vtc_scenes", FileHashes())])
    (data / "vtc_scenes.identity").write_text(identity)
    code, cells, output = _evaluate(
        folder, tmp_path, "--methods", "divprune,random", "--tasks", "vtc_scenes,vtc_mosaic",
        "--limit", str(ROWS),
    )  # fmt: skip
    assert code == 1
    assert [(c["task"], c["status"]) for c in cells] == [
        ("vtc_scenes", "failed"), ("vtc_scenes", "failed"),
        ("vtc_mosaic", "done"), ("vtc_mosaic", "done"),
    ]  # fmt: skip
    for cell in cells[:2]:
        assert cell["error"] == "SampleError: vtc_scenes/2: OSError: Truncated File Read"
    assert "vtc_scenes/2: OSError" in output
    assert [c["samples"] for c in cells[2:]] == [ROWS, ROWS]


def test_a_failing_method_fails_its_cell_only(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vtc.methods.divprune import DivPrune

    original, calls = DivPrune.select, []

    def select(self: Any, tokens: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise ArithmeticError("no token is left to be told apart")
        return original(self, tokens)

    with monkeypatch.context() as patched:
        patched.setattr(DivPrune, "select", select)
        code, (bad, good), output = _evaluate(folder, tmp_path, "--methods", "divprune,random")
    assert code == 1
    assert len(calls) == 2
    assert (bad["status"], good["status"]) == ("failed", "done")
    assert "ArithmeticError: no token is left to be told apart" in bad["error"]
    assert "no token is left" in output
    # What it had answered is kept for when it is mended.
    asked = _counting(monkeypatch)
    code, cells, _ = _evaluate(folder, tmp_path, "--methods", "divprune,random")
    assert (code, [c["status"] for c in cells]) == (0, ["done", "done"])
    assert len(asked) == ROWS - 1
