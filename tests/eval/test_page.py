# SPDX-License-Identifier: Apache-2.0
"""The page of a run: what it says, that nothing in it comes from elsewhere, and how it behaves."""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("lmms_eval")

from vtc.eval.analysis import stats
from vtc.eval.harness import run as runner
from vtc.eval.harness.identity import digest
from vtc.eval.harness.results import hard, logged
from vtc.eval.report import page as pages
from vtc.eval.report import viewer
from vtc.eval.report.page import machine, write_page

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>&amp;\"'"
JPEG = base64.b64encode(b"not looked at").decode()
N = 40
# Right answers of each method, by design: see `test_tests_by_hand` and `test_split_by_hand`.
RIGHT = {
    "full": range(36),
    "blind": range(8),
    "random": range(20),
    "pool": range(22),
    "downsample": range(18),
    "todre": range(6, 36),
}


SETUP = {
    "id": "embedded", "fingerprint": "f1", "lmms_eval": "llava_hf", "prompts": "vtc_embedded",
    "chat": True, "model_args": {}, "limit": N, "batch_size": 1, "seed": 7, "dtype": "float32",
    "device": "cpu", "data": "d1",
}  # fmt: skip
GROUP = digest(["vtc_scenes", SETUP])
# On these two of five differ, the most evenly that there is, and they come first; the types of
# question take turns.
SHOWN = ("vtc_scenes/20", "vtc_scenes/21")


@pytest.fixture(autouse=True)
def _two_samples(monkeypatch):
    monkeypatch.setattr(pages, "SAMPLES", 2)


class Page(HTMLParser):
    """The elements of a page: (tag, attributes, text directly inside)."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[list[Any]] = []
        self.open: list[list[Any]] = []
        self.tables: dict[str, list[list[list[Any]]]] = {}
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = [tag, dict(attrs), ""]
        self.elements.append(element)
        if tag == "table":
            self.rows = self.tables.setdefault(element[1]["id"], [])
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append(element)
        if tag not in ("meta", "img", "br"):
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element[2] += data

    def texts(self, tag: str, **wanted: str) -> list[str]:
        return [
            text.strip()
            for name, attrs, text in self.elements
            if name == tag
            and wanted.items() <= {k.rstrip("_"): v for k, v in attrs.items()}.items()
        ]

    def table(self, name: str) -> list[dict[str, str]]:
        head, *rows = self.tables[name]
        names = [cell[2].strip() for cell in head]
        return [dict(zip(names, (c[2].strip() for c in row), strict=True)) for row in rows]

    @property
    def alerts(self) -> list[str]:
        return [t for _, attrs, t in self.elements if attrs.get("role") == "status"]

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.texts("script", id="data")[0])


def _samples(label: str) -> list[dict[str, Any]]:
    """Questions 0, 2, 4, ... of type "a" have the answer "yes", one in four of the others "no"."""
    samples = []
    for i in range(N):
        target = "yes" if i % 2 == 0 else ("no" if i % 8 == 1 else f"thing {i}")
        right = i in RIGHT[label]
        samples.append(
            {
                "id": f"vtc_scenes/{i}",
                "type": "a" if i % 2 == 0 else "b",
                "target": target,
                "answer": f" {target}" if right else " never",
                "score": float(right),
            }
        )
    return samples


def _cell(label: str, keep: float | None, samples: list[dict[str, Any]]) -> dict[str, Any]:
    scores = [s["score"] for s in samples]
    tokens = 576.0 if keep is None else 576 * keep
    kinds = {}
    for kind in ("a", "b"):
        part = [s["score"] for s in samples if s["type"] == kind]
        kinds[kind] = {"score": sum(part) / len(part), "interval": list(stats.interval(part))}
        kinds[kind]["samples"] = len(part)
    return {
        "key": f"key-{label}", "task": "vtc_scenes", "label": label, "keep": keep,
        "method": {"method": "full" if label == "blind" else label}, "blind": label == "blind",
        "status": "done", "error": None, "metric": "exact_match", "score": sum(scores) / N,
        "interval": list(stats.interval(scores)), "samples": N, "by_type": kinds,
        "loyalty": 0.5, "hard": None, "lmms_eval": {},
        "tokens": {"in": 576.0, "out": tokens, "per_layer": [tokens] * 8, "equivalent": tokens},
        "flops": {"vision": 5e9, "projector": 1e8, "lm": 6e9 * tokens / 576, "total": 1e10},
        "kv_bytes": 1024.0**2, "ms": {"vision": 9.0, "selector": 0.5, "lm": 35.0},
        "seconds": 2.0, "setup": SETUP,
        "versions": {"vtc": "0.1.0", "torch": "2.14.1"}, "warnings": [],
    }  # fmt: skip


def _settings(**changed: Any) -> dict[str, Any]:
    return {
        "out": "/somewhere/private/results", "model": "embedded", "methods": ["todre", "fastv"],
        "keeps": [0.25], "tasks": ["vtc_scenes"], "limit": N, "batch_size": 1, "device": None,
        "dtype": None, "seed": 7, "baselines": True, "lmms_model": None, **changed,
    }  # fmt: skip


def _save(out: Path, results: dict[str, Any]) -> None:
    (out / "results.json").write_text(json.dumps(results), "utf-8")


def _log(out: Path, key: str, samples: list[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(s) + "\n" for s in samples)
    (out / "cells" / f"{key}.jsonl").write_text(lines, "utf-8")


def _results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text("utf-8"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A run's folder: five baselines, todre, and fastv, which failed. Two samples have pictures."""
    (tmp_path / "cells").mkdir()
    cells = []
    for label in RIGHT:
        samples = _samples(label)
        cells.append(_cell(label, None if label in ("full", "blind") else 0.25, samples))
        _log(tmp_path, cells[-1]["key"], samples)
    failed = {
        "key": "key-fastv", "task": "vtc_scenes", "label": "fastv", "keep": 0.25,
        "method": {"method": "fastv"}, "blind": False, "status": "failed",
        "error": f"RuntimeError: {EVIL}", "setup": SETUP,
        "versions": {"vtc": "0.1.0"}, "warnings": [EVIL],
    }  # fmt: skip
    settings = _settings()
    model = {"id": "embedded", "fingerprint": "f1", "lmms_eval": "llava_hf"}
    results = {"format": 1, "vtc": "0.1.0", "settings": settings, "model": model}
    _save(tmp_path, {**results, "cells": [*cells, failed]})
    shown = {"question": EVIL, "image": JPEG, "size": [336, 336], "grid": [24, 24], "note": None}
    kept = {"into the language model": viewer.bits(range(576), 576)}
    kept["before layer 2"] = viewer.bits(range(0, 576, 4), 576)
    second = {"grid": [24, 24], "stages": kept}
    found = {
        "format": 2,
        "samples": {GROUP: dict.fromkeys(SHOWN, shown)},
        "kept": {
            cell["key"]: {
                s["id"]: {"answer": s["answer"], **second}
                for s in _samples(cell["label"])
                if s["id"] in SHOWN
            }
            for cell in cells
            if not cell["blind"]
        },
    }
    (tmp_path / "samples.json").write_text(json.dumps(found), "utf-8")
    return tmp_path


# ---- one file, nothing from elsewhere -----------------------------------------------------------
def test_nothing_is_fetched_and_only_own_scripts_run(out):
    page = Page(write_page(out))
    links = [v for _, a, _ in page.elements for k, v in a.items() if k in ("src", "href", "action")]
    assert len(links) == 1
    assert links[0].startswith("data:image/svg+xml;base64,")
    tags = [tag for tag, _, _ in page.elements]
    assert not {"link", "iframe", "object", "form", "base"} & set(tags)
    assert not [k for _, a, _ in page.elements for k in a if k.startswith("on") or k == "style"]
    (policy,) = (a["content"] for _, a, _ in page.elements if "http-equiv" in a)
    assert policy.startswith("default-src 'none'; img-src data:;")
    text = (out / "report.html").read_text("utf-8")
    for tag, rule in (("style", "style-src"), ("script", "script-src")):
        (body,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.S)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{rule} 'sha256-{digest}'" in policy
    assert tags.count("script") == 2  # the data and the code
    assert "@import" not in text
    assert "url(" not in text


def test_text_from_data_is_escaped(out):
    results = _results(out)
    results["cells"][5]["label"] = EVIL  # not a method, but a file may hold anything
    _save(out, results)
    page = Page(write_page(out))
    tags = [tag for tag, _, _ in page.elements]
    assert tags.count("script") == 2
    assert tags.count("img") == 1
    assert [s["question"] for s in page.data["samples"]] == [EVIL, EVIL]
    assert EVIL in [row["method"] for row in page.table("results-1")]
    codes = page.texts("code")
    assert codes == [f"RuntimeError: {EVIL}", EVIL]


def test_the_same_run_gives_the_same_page_without_private_paths(out, tmp_path):
    results = _results(out)
    results["model"]["id"] = results["settings"]["model"] = "/home/somebody/models/mine"
    _save(out, results)
    first = write_page(out).read_bytes()
    assert write_page(out).read_bytes() == first
    for private in (b"/somewhere", b"somebody", str(tmp_path).encode()):
        assert private not in first
    assert Page(out / "report.html").texts("h1") == ["vtc eval: mine"]
    assert not list(out.glob(".report.html*"))


# ---- what it says -------------------------------------------------------------------------------
def test_results_table(out):
    page = Page(write_page(out))
    rows = {row["method"]: row for row in page.table("results-1")}
    assert list(rows) == [*RIGHT, "fastv", "chance"]
    full, todre = rows["full"], rows["todre"]
    assert full["accuracy, %"] == "90.0"
    assert full["keep"] == "–"
    low, high = (100 * x for x in stats.wilson(36, N))
    assert full["95 % interval"] == f"{low:.1f} to {high:.1f}"
    assert todre["tokens, mean"] == "144.0"
    assert todre["tokens × layers"] == "144×8"
    assert todre["LM, GFLOPs"] == "1.50"
    assert todre["samples"] == "40"
    assert rows["fastv"]["accuracy, %"] == "failed"
    assert {row["method"]: row["a (20)"] for row in page.table("types-1")}["full"] == "90.0"


def test_chance_by_hand(out):
    """ "yes" is right on all 20 of type a, "no" on the 5 of type b that are 1 modulo 8."""
    page = Page(write_page(out))
    (row,) = (row for row in page.table("results-1") if row["method"] == "chance")
    assert row["accuracy, %"] == "62.5"
    (note,) = (t for t in page.texts("p") if t.startswith("chance: always"))
    assert "a: “yes” (20 of 20); b: “no” (5 of 20)" in note


def test_no_chance_where_scores_are_not_a_match(out):
    samples = _samples("todre")
    samples[3]["answer"] = "nearly"
    samples[3]["score"] = 1.0
    _log(out, "key-todre", samples)
    page = Page(write_page(out))
    assert "chance" not in [row["method"] for row in page.table("results-1")]
    assert any(t.startswith("chance: not computed") for t in page.texts("p"))


def test_tests_by_hand(out):
    """todre is right on 6 to 35: it loses 6 to full, and wins and loses against the others."""
    rows = {row["against"]: row for row in Page(write_page(out)).table("tests-1")}
    counts = {"full": (0, 6), "random": (16, 6), "pool": (14, 6), "downsample": (18, 6)}
    p = {name: scipy.stats.binomtest(w, w + lost).pvalue for name, (w, lost) in counts.items()}
    order = sorted(p, key=lambda name: p[name])
    corrected, largest = {}, 0.0
    for rank, name in enumerate(order):
        largest = max(largest, min(1.0, (4 - rank) * p[name]))
        corrected[name] = largest
    assert set(rows) == set(counts)
    for name, (wins, losses) in counts.items():
        row = rows[name]
        assert (row["higher"], row["lower"]) == (str(wins), str(losses))
        assert row["difference, points"] == f"{100 * (wins - losses) / N:+.1f}"
        assert row["p"] == f"{p[name]:.3f}"
        assert row["p, Holm"] == f"{corrected[name]:.3f}"
        assert row["it is"] == "no significant difference"
    page = Page(out / "report.html")
    (note,) = (t for t in page.texts("p") if t.startswith("Two-sided p"))
    assert "McNemar's exact test" in note
    assert "Holm 1979 for the 4 tests" in note


def test_baselines_are_taken_at_no_fewer_tokens(out):
    """576 * 0.1 = 57.6; 9 of 576 tokens are met by 0.1; a method between layers by 0.25 only."""
    results = _results(out)
    new = (("random", 0.1, 57.6), ("todre", 0.1, 57.6), ("todre:keep=9", None, 9.0))
    for label, keep, tokens in (*new, ("fastv", 0.2, 62.0), ("fastv", 0.5, 300.0)):
        samples = _samples("random" if label == "random" else "todre")
        cell = {**_cell(label.partition(":")[0], keep, samples), "label": label}
        cell["key"] += f"-{keep}"
        cell["tokens"] = {**cell["tokens"], "equivalent": tokens}
        results["cells"].append(cell)
        _log(out, cell["key"], samples)
    _save(out, results)
    page = Page(write_page(out))
    found = {
        (row["method"], row["keep"], row["against"], row["other's tokens"])
        for row in page.table("tests-1")
    }
    wanted = set()
    for name, keep, tokens in (
        ("todre", "0.25", "144.0"),
        ("todre", "0.1", "57.6"),
        ("todre:keep=9", "–", "57.6"),
        ("fastv", "0.2", "144.0"),
        ("fastv", "0.5", None),
    ):
        wanted.add((name, keep, "full", "576.0"))
        if tokens is not None:
            wanted.add((name, keep, "random", tokens))
            wanted |= {(name, keep, other, "144.0") for other in ("pool", "downsample")}
    assert found == wanted
    assert "Not every baseline ran at the same number of tokens: fastv keep 0.5." in page.texts("p")


def test_a_clear_difference_is_called_one(out):
    for label, right in (("todre", range(40)), ("random", range(5)), ("full", range(36))):
        samples = [{**s, "score": float(i in right)} for i, s in enumerate(_samples(label))]
        _log(out, f"key-{label}", samples)
    rows = {row["against"]: row["it is"] for row in Page(write_page(out)).table("tests-1")}
    assert rows["random"] == "better"
    assert rows["full"] == "no significant difference"
    _log(out, "key-todre", [{**s, "score": 0.0} for s in _samples("todre")])
    rows = {row["against"]: row["it is"] for row in Page(write_page(out)).table("tests-1")}
    assert rows["full"] == rows["pool"] == "worse"


def test_shares_are_permuted_and_other_metrics_are_not_tested(out):
    rng = np.random.default_rng(0)
    results = _results(out)
    for cell in results["cells"][:6]:
        scores = rng.random(N)
        _log(out, cell["key"], [
            {**s, "score": x} for s, x in zip(_samples(cell["label"]), scores, strict=True)
        ])  # fmt: skip
    page = Page(write_page(out))
    (note,) = (t for t in page.texts("p") if t.startswith("Two-sided p"))
    assert "paired permutation test" in note
    assert "McNemar" not in note
    for cell in results["cells"][:6]:  # as for MME: a sum, of which samples do not tell the spread
        cell.update(interval=None, score=1500.0, metric="mme", by_type={})
    _save(out, results)
    page = Page(write_page(out))
    assert not {"tests-1", "split-1", "types-1"} & set(page.tables)
    assert {row["method"]: row["mme"] for row in page.table("results-1")}["full"] == "1500"


def test_split_by_hand(out):
    """Of the 36 that full gets right, down-sampling gets 18 wrong (18 to 35) and 18 right."""
    rows = {row["method"]: row for row in Page(write_page(out)).table("split-1")}
    assert set(rows) == {"random", "pool", "todre"}
    assert rows["todre"]["A: samples"] == rows["todre"]["B: samples"] == "18"
    assert rows["todre"]["A: accuracy, %"] == "100.0"
    assert rows["todre"]["B: accuracy, %"] == f"{100 * 12 / 18:.1f}"
    assert rows["pool"]["A: accuracy, %"] == f"{100 * 4 / 18:.1f}"
    # What results.json calls "hard" is group A.
    logs = (logged(out, f"key-{x}") for x in ("pool", "full", "downsample"))
    assert hard(*logs) == {"samples": 18, "score": pytest.approx(4 / 18)}


def test_settings_versions_and_machine(out):
    page = Page(write_page(out))
    assert any("does not name the run's" in t for t in page.texts("h3"))
    results = _results(out)
    results["machine"] = {"cpu": "an abacus", "gpu": None}
    results["cells"][0]["versions"]["torch"] = "2.13.0"
    _save(out, results)
    page = Page(write_page(out))
    facts = dict(zip(page.texts("dt"), page.texts("dd"), strict=True))
    assert facts["seed"] == "7"
    assert facts["cpu"] == "an abacus"
    assert (facts["device"], facts["dtype"]) == (SETUP["device"], SETUP["dtype"])  # of the cells
    assert "without start" in facts["time of all cells"]
    assert facts["torch"] == "2.13.0, 2.14.1"
    assert "Machine" in page.texts("h3")


def test_machine_names_no_host():
    found = machine("cpu")
    assert found["gpu"] is None
    assert found["cores"] >= 1
    assert os.uname().nodename not in json.dumps(found)


# ---- runs that are not whole --------------------------------------------------------------------
def test_failed_and_missing_cells_are_named(out):
    results = _results(out)
    results["settings"]["keeps"] = [0.25, 0.1]
    _save(out, results)
    (out / "cells" / "key-pool.jsonl").unlink()
    page = Page(write_page(out))
    failed, missing, lost = page.alerts
    assert failed.startswith("1 of 7 cells failed")
    assert "5 of 12 cells are missing" in missing
    assert "vtc_scenes todre keep 0.1" in missing
    assert lost.endswith("no tests: vtc_scenes pool keep 0.25.")
    assert [row["against"] for row in page.table("tests-1")] == ["full", "random", "downsample"]


def test_empty_runs_give_a_page_that_says_so(out, tmp_path):
    results = _results(out)
    (tmp_path / "none").mkdir()
    page = Page(write_page(tmp_path / "none"))
    assert page.alerts[0].startswith("This folder holds no results.json")
    _save(out, {**results, "cells": []})
    page = Page(write_page(out))
    assert page.alerts[0] == "No cell of this run has finished."
    assert not page.tables
    _save(out, {**results, "cells": results["cells"][-1:]})
    page = Page(write_page(out))
    assert len(page.alerts) == 3  # none finished, one failed, the others are missing
    assert page.texts("code")[0] == f"RuntimeError: {EVIL}"
    assert "img" not in [tag for tag, _, _ in page.elements]


def test_refusals(out, tmp_path):
    with pytest.raises(ValueError, match="samples: expected a whole number of at least 0, got -1"):
        write_page(out, samples=-1)
    with pytest.raises(FileNotFoundError, match="out: expected the folder of a run"):
        write_page(tmp_path / "nowhere")
    _save(out, {**_results(out), "format": 2})
    with pytest.raises(ValueError, match="expected format 1"):
        write_page(out)
    (out / "results.json").write_text("{", "utf-8")
    with pytest.raises(ValueError, match="is not a result of vtc eval"):
        write_page(out)
    assert not (out / "report.html").exists()


# ---- samples ------------------------------------------------------------------------------------
@given(st.integers(1, 50).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_bits_can_be_read_back(case):
    size, kept = case
    text = viewer.bits(sorted(kept), size)
    read = {i for i in range(size) if int(text[i >> 2], 16) >> (3 - (i & 3)) & 1}
    assert read == kept
    with pytest.raises(ValueError, match="kept: expected numbers below"):
        viewer.bits([size], size)


def test_samples_on_which_methods_differ_come_first():
    def log(right: set[int]) -> dict[str, Any]:
        kinds = ["a", "a", "a", "a", "b", "b"]
        return {
            f"t/{i}": {"type": kind, "score": float(i in right), "answer": str(i in right)}
            for i, kind in enumerate(kinds)
        }

    cells = [{"key": k, "blind": k == "blind"} for k in ("full", "x", "y", "z", "blind")]
    # 1: one of four differs; 3: two of four; 4, 5 and the others: none
    logs = {"full": log({1, 3}), "x": log({1, 3}), "y": log({1}), "z": log(set())}
    logs["blind"] = log({0, 2, 4})
    assert viewer.choose(cells, logs, 3) == {"t/1": True, "t/3": True, "t/4": False}
    assert viewer.choose(cells, logs, 99).keys() == logs["full"].keys()
    assert viewer.choose(cells, {}, 3) == {}


def test_types_and_differences_are_in_the_page(out):
    page = Page(write_page(out, samples=4, trace=False))
    assert page.data["types"] == ["a", "b"]
    assert [s["differs"] for s in page.data["samples"]] == [True] * 4
    assert {"pick-type", "only-differing"} <= {a.get("id") for _, a, _ in page.elements}


def test_cells_of_another_setting_have_tables_and_samples_of_their_own(out):
    results = _results(out)
    other = {**results["cells"][5], "key": "key-other", "setup": {**SETUP, "seed": 8}}
    _log(out, "key-other", _samples("todre"))
    _save(out, {**results, "cells": [*results["cells"], other]})
    page = Page(write_page(out, trace=False))
    titles = [t for t in page.texts("h2") if t.startswith("vtc_scenes")]
    assert titles == ["vtc_scenes · seed 7", "vtc_scenes · seed 8"]
    assert len(page.table("results-2")) == 2  # itself and chance
    assert "tests-2" not in page.tables
    entries = page.data["samples"]
    assert {len(e["cells"]) for e in entries} == {6, 1}
    assert entries[-1]["id"].endswith("(vtc_scenes · seed 8)")
    assert len([a for t, a, _ in page.elements if t == "img"]) == 2


def test_what_was_traced_is_not_traced_again(out, monkeypatch):
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(viewer, "load", never)
    data = Page(write_page(out)).data
    names = [cell["name"] for cell in data["cells"]]
    assert names[data["first"]] == "todre keep 0.25"
    said = data["samples"][1]["cells"][str(data["first"])]
    assert [stage["kept"] for stage in said["stages"]] == [576, 144]
    assert said["second"] is None
    assert "stages" not in data["samples"][0]["cells"]["1"]  # blind


def test_another_answer_in_the_second_pass_is_said(out):
    found = json.loads((out / "samples.json").read_text("utf-8"))
    found["kept"]["key-todre"][SHOWN[0]]["answer"] = "something else"
    (out / "samples.json").write_text(json.dumps(found), "utf-8")
    data = Page(write_page(out)).data
    assert data["samples"][0]["cells"][str(data["first"])]["second"] == "something else"


def test_without_pictures_the_answers_are_still_there(out, monkeypatch):
    def broken(*_: Any, **__: Any) -> None:
        raise OSError("no such model")

    (out / "samples.json").unlink()
    data = Page(write_page(out, samples=8, trace=False)).data
    assert len(data["samples"]) == 8
    assert data["samples"][0]["image"] is None
    assert data["samples"][0]["cells"]["0"]["answer"] == "yes"
    monkeypatch.setattr(viewer, "find_source", broken)
    page = Page(write_page(out, samples=8))
    assert any(t.endswith("OSError: no such model") for t in page.texts("p"))
    assert page.data["samples"] == data["samples"]
    assert not Page(write_page(out, samples=0)).texts("script", id="data")


def test_the_page_stays_small(out):
    found = json.loads((out / "samples.json").read_text("utf-8"))
    big = {**found["samples"][GROUP][SHOWN[0]], "image": "A" * 900_000}
    found["samples"] = {GROUP: {f"vtc_scenes/{i}": big for i in range(N)}}
    (out / "samples.json").write_text(json.dumps(found), "utf-8")
    page = write_page(out, samples=8, trace=False)
    assert page.stat().st_size < 5_000_000
    assert len(Page(page).data["samples"]) == 3
    assert any(t.startswith("5 samples are left out") for t in Page(page).texts("p"))


@pytest.mark.slow
def test_of_a_real_run(tmp_path, monkeypatch):
    """On the tiny model: the tokens drawn are as many as the run counted."""
    from tests.eval.evalkit import save_model, write_rows

    def build_task(name, out_dir, limit=None, seed=0):
        return write_rows(Path(out_dir) / "built.parquet", ["w1", "w2", "w3", "w4"][:limit])

    monkeypatch.setattr("vtc.eval.tasks.parquet.build_task", build_task)
    monkeypatch.setattr(runner, "hub_answers", lambda: False)
    model = save_model(tmp_path / "model")
    settings = runner.Settings(
        out=tmp_path / "run", model=str(model), methods=("todre", "fastv", "fastv|todre:keep=0.5"),
        keeps=(0.25,), tasks=("vtc_scenes",), limit=4,
    )  # fmt: skip
    results = runner.run(settings)
    page = Page(write_page(tmp_path / "run", samples=3))
    assert not page.alerts
    data = page.data
    assert len(data["samples"]) == 3
    seen = 0
    for i, cell in enumerate(results["cells"]):
        for sample in data["samples"]:
            said = sample["cells"][str(i)]
            assert said["second"] is None
            if cell["blind"]:
                continue
            assert said["grid"] == [6, 6]
            counts = [stage["kept"] for stage in said["stages"]]
            layers = dict.fromkeys(round(n) for n in cell["tokens"]["per_layer"])
            assert set(layers) <= set(counts), cell["label"]
            assert counts[-1] == list(layers)[-1]
            seen += 1
    assert seen == 3 * (len(results["cells"]) - 1)
    assert base64.b64decode(data["samples"][0]["image"])[:2] == b"\xff\xd8"
    assert not any(t.startswith("Not all pictures") for t in page.texts("p"))


# ---- in a browser -------------------------------------------------------------------------------
class Browser:
    """Headless Chromium, spoken to through a pipe."""

    def __init__(self, program: str, profile: Path) -> None:
        pipes = [os.pipe(), os.pipe()]
        # Above 4, so that putting them at 3 and 4 overwrites none of them.
        theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (pipes[0][0], pipes[1][1])]
        options = ["--headless", "--disable-gpu", "--remote-debugging-pipe"]
        options += [f"--user-data-dir={profile}", *(["--no-sandbox"] * (os.geteuid() == 0))]
        place = "import os, sys; a, b, *rest = sys.argv[1:]; os.dup2(int(a), 3); "
        place += "os.dup2(int(b), 4); os.execvp(rest[0], rest)"
        self.process = subprocess.Popen(
            [sys.executable, "-c", place, *map(str, theirs), program, *options],
            pass_fds=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for fd in (*theirs, pipes[0][0], pipes[1][1]):
            os.close(fd)
        self.write, self.read = os.fdopen(pipes[0][1], "wb"), os.fdopen(pipes[1][0], "rb")
        self.number, self.session, self.rest = 0, None, b""
        self.events: list[dict[str, Any]] = []

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        self.write.write(json.dumps(message).encode() + b"\0")
        self.write.flush()
        while True:
            found = self._message()
            if found.get("id") == self.number:
                assert "error" not in found, found
                return found["result"]
            self.events.append(found)

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            part = os.read(self.read.fileno(), 1 << 20)
            assert part, "the browser ended"
            self.rest += part
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def open(self, address: str) -> None:
        self.session = None
        target = self("Target.createTarget", url="about:blank")["targetId"]
        attached = self("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self(f"{domain}.enable")
        self("Page.navigate", url=address)
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self._message())
        self.events = [e for e in self.events if e.get("method") != "Page.loadEventFired"]

    def run(self, script: str) -> Any:
        found = self("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    @property
    def complaints(self) -> list[Any]:
        kinds = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
        return [e["params"] for e in self.events if e.get("method") in kinds]


@contextmanager
def _browser(profile: Path) -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip(f"none of {', '.join(names)} is installed: the page was only parsed")
    browser = Browser(program, profile)
    try:
        yield browser
        browser.session = None
        browser("Browser.close")
        browser.process.wait(20)
    finally:
        if browser.process.poll() is None:
            browser.process.kill()
            browser.process.wait()
        with suppress(BrokenPipeError):  # it may have ended by itself, which the test says
            browser.write.close()
        browser.read.close()


COLUMN = "[...document.querySelectorAll('#results-1 tbody tr')].map(r => r.cells[0].textContent)"
SORTS = "[...document.querySelectorAll('#results-1 thead th')].map(c => c.ariaSort)"


def _filters(browser: Browser) -> None:
    """By type of question, and by whether methods differ."""
    options = "[...document.querySelectorAll('#pick-sample option')].map(o => o.textContent)"
    change = (
        "(e => {{ e.{}; e.dispatchEvent(new Event('change')); }})(document.getElementById('{}'))"
    )
    assert [o.split(":")[0] for o in browser.run(options)] == list(SHOWN)
    browser.run(change.format("value = 'a'", "pick-type"))
    assert [o.split(":")[0] for o in browser.run(options)] == [SHOWN[0]]
    assert "type=a" in browser.run("location.hash")
    browser.run("document.getElementById('next').click()")
    assert SHOWN[0].replace("/", "%2F") in browser.run("location.hash")
    browser.run(change.format("checked = true", "only-differing"))
    assert len(browser.run(options)) == 1
    browser.run(change.format("value = ''", "pick-type"))
    assert len(browser.run(options)) == 2


@pytest.mark.slow
def test_in_a_browser(out, tmp_path):
    path = write_page(out)
    page = Page(path)
    # What the script relies on, and all that can be said without a browser.
    head, *rows = page.tables["results-1"]
    assert all(cell[1]["aria-sort"] == "none" for cell in head)
    assert page.texts("button")[: len(head)] == [cell[2].strip() for cell in head]
    scores = [float(row[2][1].get("data-sort", "nan")) for row in rows]
    assert scores[:6] == pytest.approx([90, 20, 50, 55, 45, 75])
    picture = {"pick-sample", "pick-cell", "pick-stage", "previous", "next", "picture", "facts"}
    assert picture <= {a.get("id") for _, a, _ in page.elements}

    with _browser(tmp_path / "profile") as browser:
        browser.open(path.as_uri())
        button = "document.querySelectorAll('#results-1 thead button')[2].click()"
        browser.run(button)
        by_score = ["full", "todre", "chance", "pool", "random", "downsample", "blind", "fastv"]
        assert browser.run(COLUMN) == by_score  # what failed has no score and stays last
        assert browser.run(SORTS)[:3] == ["none", "none", "descending"]
        browser.run(button)
        assert browser.run(COLUMN) == [*by_score[-2::-1], "fastv"]
        assert browser.run(SORTS)[2] == "ascending"
        browser.run("document.querySelectorAll('#results-1 thead button')[0].click()")
        assert browser.run(COLUMN) == sorted(by_score)
        assert browser.run(SORTS)[2] == "none"

        text = "document.getElementById('{}').textContent".format
        assert "todre keep 0.25, before layer 2: 144 of 576 tokens" in browser.run(text("caption"))
        assert EVIL in browser.run(text("facts"))
        assert "✓ right" in browser.run(text("facts"))
        lit = "document.querySelector('.dropped').getAttribute('d').split('M').length - 1"
        assert browser.run(lit) == 576 - 144
        # Six stripes of one column: two sides in each of 24 rows, and both ends.
        assert browser.run(lit.replace("dropped", "border")) == 6 * 2 * 24 + 6 * 2
        box = (
            "(r => [r.width, r.height])(document.querySelector('#picture').getBoundingClientRect())"
        )
        width, height = browser.run(box)
        assert width == pytest.approx(height, rel=0.02)
        assert width > 200
        browser.run("document.getElementById('next').click()")
        assert "thing 21" in browser.run(text("facts"))
        browser.run("document.querySelector('#all button').click()")  # full
        assert "full, before layer 2" in browser.run(text("caption"))
        assert "✓ right" in browser.run(text("facts"))
        state = browser.run("location.hash")
        assert "sample=vtc_scenes%2F21" in state
        assert "sort=results-1.0.ascending" in state
        assert browser.run("document.querySelectorAll('script').length") == 2
        # The picture is not one, and of that only the console complains; no policy is broken.
        assert not [c for c in browser.complaints if "Content Security Policy" in json.dumps(c)]
        assert not [e for e in browser.events if e.get("method") == "Runtime.exceptionThrown"]
        assert not [e for e in browser.events if e.get("method") == "Page.javascriptDialogOpening"]

        browser.open(path.as_uri() + state)  # the link shows the same
        assert browser.run(COLUMN) == sorted(by_score)
        assert "full, before layer 2" in browser.run(text("caption"))
        _filters(browser)
        size = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
        browser("Emulation.setDeviceMetricsOverride", **size)
        assert browser.run("document.documentElement.scrollWidth") <= 360
        plot = "(r => [r.left, r.right])(document.querySelector('.plot').getBoundingClientRect())"
        left, right = browser.run(plot)
        assert left >= 0  # with its legend, which is part of the picture
        assert right <= 360
        dark = [{"name": "prefers-color-scheme", "value": "dark"}]
        ground = "getComputedStyle(document.body).backgroundColor"
        assert browser.run(ground) == "rgb(255, 255, 255)"
        browser("Emulation.setEmulatedMedia", features=dark)
        assert browser.run(ground) == "rgb(20, 23, 27)"
