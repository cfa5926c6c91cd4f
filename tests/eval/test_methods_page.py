# SPDX-License-Identifier: Apache-2.0
"""The page of all methods: its comparisons, its words, its refusals, its picture."""

from __future__ import annotations

import json
import shlex
import textwrap
from pathlib import Path

import pytest
from vtc.eval.analysis import methods_page
from vtc.eval.analysis.methods_page import draw, write

import vtc
from tests.eval.test_page import _cell, _log, _samples


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """todre is right on 40 of the questions, random on 5, pool on none, fastv as random is."""
    cells = []
    (tmp_path / "cells").mkdir()
    for label, keep, right in (
        ("full", None, 40),
        ("blind", None, 4),
        ("random", 0.25, 5),
        ("random:keep=0.5", 0.5, 6),
        ("pool", 0.25, 0),
        ("downsample", 0.25, 5),
        ("todre", 0.25, 38),
        ("fastv", 0.2, 5),
    ):
        samples = [{**s, "score": float(i < right)} for i, s in enumerate(_samples("full"))]
        cell = _cell(label, keep, samples)
        cell["key"] += f"-{keep}"
        if label == "random:keep=0.5":  # named with its keep, which was not swept
            cell |= {"keep": None, "method": {"method": "random", "keep": 0.5}}
        cell["versions"] = {"vtc": "0", "torch": "1"}
        if label == "fastv":
            cell["tokens"] = {**cell["tokens"], "out": 576.0, "equivalent": 200.0}
        cells.append(cell)
        _log(tmp_path, cell["key"], samples)
    settings = {"methods": ["todre", "fastv"], "keeps": [0.25, 0.2], "limit": 40}
    results = {"cells": cells, "settings": settings, "machine": {"cpu": "a cpu", "threads": 2}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    return tmp_path


def _row(page: str, start: str) -> list[str]:
    (line,) = (line for line in page.splitlines() if line.startswith(start))
    return [part.strip() for part in line.strip("|").split("|")]


def test_methods_are_compared_at_no_fewer_tokens(run: Path) -> None:
    page = write(run, run).read_text()
    todre, fastv = _row(page, "| `todre`"), _row(page, "| `fastv`")
    samples = len(_samples("full"))
    better = f"**{100 * 33 / samples:+.1f}**"
    assert todre[-3:] == [f"{better} (0.25)", f"**{3800 / samples:+.1f}** (0.25)", todre[-3]]
    # 200 tokens are more than 144: only random was run with as many.
    assert fastv[-3:] == [f"{-100 / samples:+.1f} (0.5)", "", ""]
    assert fastv[4:6] == ["576", "200"]
    assert "- Better than all three at every budget: `todre`." in page
    assert "- Better than all three at no budget: `fastv`." in page
    assert "Worse than" not in page
    assert "- Without all three baselines at equally many tokens: `fastv` (0.2)." in page
    assert (run / "methods.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_can_be_typed(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    results["settings"]["methods"] = [f"todre:keep=0.{i}" for i in range(11, 40)]
    (run / "results.json").write_text(json.dumps(results))
    page = write(run, run).read_text()
    (block,) = (part for part in page.split("\n\n") if part.startswith("    vtc eval"))
    words = shlex.split(textwrap.dedent(block).replace("\\\n", ""))  # as a shell does
    assert words[2:4] == ["--methods", ",".join(results["settings"]["methods"])]
    assert words[4:6] == ["--keep", "0.25,0.2"]


def test_one_comparison_won_is_not_three(run: Path) -> None:
    """At 200 tokens there is random only, which it beats; that is not better than all three."""
    (log,) = (run / "cells").glob("*todre*.jsonl")
    (other,) = (run / "cells").glob("*fastv*.jsonl")
    other.write_text(log.read_text())
    page = write(run, run).read_text()
    assert _row(page, "| `fastv`")[-3].startswith("**+")
    assert "- Better than all three at no budget: `fastv`." in page


def test_worse_is_said(run: Path) -> None:
    (log,) = (run / "cells").glob("*todre*.jsonl")
    (other,) = (run / "cells").glob("*pool*.jsonl")
    (random,) = (run / "cells").glob("*random-0.25.jsonl")
    random.write_text(log.read_text())
    log.write_text(other.read_text())
    page = write(run, run).read_text()
    assert "- Worse than at least one of the three: `todre` (0.25)." in page
    assert "_-" in _row(page, "| `todre`")[-3]


def test_a_failed_cell_and_two_tasks_are_refused(run: Path) -> None:
    file = run / "results.json"
    results = json.loads(file.read_text())
    for change in ({"status": "failed"}, {"task": "another"}, {"interval": None}):
        changed = {**results, "cells": [*results["cells"][1:], {**results["cells"][0], **change}]}
        file.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match="run: expected"):
            write(run, run)
    assert not (run / "METHODS.md").exists()


def test_a_panel_for_each_method(run: Path) -> None:
    cells = json.loads((run / "results.json").read_text())["cells"]
    panels = [axes for axes in draw(cells).axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in panels] == ["fastv", "todre"]
    low, high = panels[0].get_xlim()
    assert low < 200 < 576 < high


def test_the_committed_page_has_every_method() -> None:
    page = (Path(methods_page.__file__).parents[1] / "embedded" / "METHODS.md").read_text()
    assert page.startswith("# All methods on the embedded VLM\n\nWritten by `python -m vtc.eval")
    assert "| accuracy, % [95 %] | tokens in | tokens, mean | KV, MiB | LM, GFLOPs |" in page
    for name in vtc.methods():
        assert f"| `{name}` |" in page
