# SPDX-License-Identifier: Apache-2.0
"""The suites and the published tables: tasks exist in lmms-eval, and figures are as printed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import vtc
from vtc.core.spec import parse_method

pytest.importorskip("lmms_eval")

from vtc.eval.harness.reproduce import (
    BENCHMARKS,
    FOLDER,
    MODELS,
    MissingError,
    Plan,
    compare,
    load_tables,
    missing,
    plan_reproduction,
    require,
    settings_of,
    table_of,
)
from vtc.eval.harness.run import plan as run_plan
from vtc.eval.harness.suites import SUITES, expand
from vtc.eval.tasks import OWN_TASKS

OURS = Path(__file__).parents[2] / "eval" / "tasks"


@pytest.fixture(scope="module")
def index() -> dict[str, dict[str, Any]]:
    """lmms-eval's tasks by name; thousands of files, so read once."""
    from lmms_eval.tasks import TaskManager

    return dict(TaskManager(include_path=str(OURS)).task_index)


def _config(path: str) -> dict[str, Any]:
    """A task file with what it includes; its functions are not imported, they may need more."""
    from lmms_eval.utils import load_yaml_config

    config: dict[str, Any] = load_yaml_config(path, mode="simple")
    if (include := config.get("include")) is not None:
        names = [include] if isinstance(include, str) else include
        for name in names:
            config = {**_config(str(Path(path).parent / name)), **config}
    return config


@pytest.mark.parametrize("suite", SUITES)
def test_tasks_exist_and_have_the_metric(index, suite):
    assert SUITES[suite].entries
    for entry in SUITES[suite].entries:
        assert entry.task in index, entry.task
        # MVBench is a group: each of its tasks has the metric.
        names = [entry.task]
        if index[entry.task]["type"] == "group":
            names = _config(index[entry.task]["yaml_path"])["task"]
        for name in names:
            metrics = _config(index[name]["yaml_path"])["metric_list"]
            assert metrics[0]["metric"] == entry.metric, name


@pytest.mark.parametrize("suite", [name for name in SUITES if name != "embedded"])
def test_no_task_is_generated_here_and_none_is_there_twice(suite):
    tasks = expand(suite)
    assert len(set(tasks)) == len(tasks)
    assert not set(tasks) & set(OWN_TASKS)


def test_the_embedded_suite_needs_no_network():
    assert set(expand("embedded")) <= set(OWN_TASKS)


def test_what_is_no_suite_is_refused_with_those_that_are():
    with pytest.raises(
        ValueError, match=r"'images' .*; known are embedded, image, doc, video, reason"
    ):
        expand("images")
    with pytest.raises(TypeError, match="expected a name, got NoneType"):
        expand(None)  # type: ignore[arg-type]


# ---- vtc reproduce ------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_reproduction("llava-1.5-7b")


def test_every_file_is_a_table_of_a_model_we_know():
    files = list(FOLDER.glob("*.json"))
    loaded = [table for model in MODELS for table in load_tables(model)]
    assert len(loaded) == len(files) >= 6
    kinds = [table.kind for table in loaded]
    assert kinds == sorted(kinds, reverse=True)  # re-runs before what is cited
    assert all(table.source.startswith(table.paper) for table in loaded)


_UNPRINTED = {"v2drop": 0, "restore": 1, "sieve": 1, "diffprune": 2, "cen-prune": 4}
"""Benchmarks that go into a table's printed means and are not in our data."""


def test_printed_means_follow_from_the_printed_figures():
    """A mistyped figure shows: papers print the mean ratio to the full model beside them.

    Where all benchmarks are here the mean is exactly that. Elsewhere it tells what the others must
    have been, which has to be a figure that a benchmark can have.
    """
    checked = 0
    tables = {table.id: table for table in load_tables("llava-1.5-7b")}
    for name, unprinted in _UNPRINTED.items():
        # DiffPrune's and V2Drop's rows are printed beside those of SIEVE's full model.
        whole = {**tables["sieve"].rows[0].scores, "MME-P": 1511}
        whole |= next((r.scores for r in tables[name].rows if r.method == "full"), {})
        for row in tables[name].rows:
            if row.mean_ratio is None or row.method == "full":
                continue
            ratios = [100 * score / whole[column] for column, score in row.scores.items()]
            checked += 1
            if unprinted == 0:
                assert sum(ratios) / len(ratios) == pytest.approx(row.mean_ratio, abs=0.06), row
                continue
            others = ((len(ratios) + unprinted) * row.mean_ratio - sum(ratios)) / unprinted
            assert min(ratios) - 10 < others < 105, (row, others)
    assert checked >= 70


def test_benchmarks_are_tasks_of_lmms_eval_with_their_metrics_and_data(index):
    for name, benchmark in BENCHMARKS.items():
        if benchmark.task is None:
            assert benchmark.differs, name
            continue
        config = _config(index[benchmark.task]["yaml_path"])
        assert set(benchmark.metrics) <= {m["metric"] for m in config["metric_list"]}, name
        assert config["dataset_path"] == benchmark.data, name


def test_the_plan_has_each_method_once_and_says_what_is_left_out(plan):
    texts = [planned.text for planned in plan.methods]
    assert texts[0] == "full"
    assert len(set(texts)) == len(texts)
    for planned in plan.methods[1:]:
        assert parse_method(planned.text) == planned.method
    # One target of each convention, counted anew.
    found = {p.text: p for p in plan.methods}
    layers = 32
    assert found["fastv:keep=166:layer=2"].tokens == 192
    assert (2 * 576 + 30 * 166) / layers == pytest.approx(192, abs=0.5)
    assert found["fastv:keep=288:layer=3"].convention == "kept"
    assert found["visionzip:keep=64:contextual=0.15625"].method == vtc.preset(
        "visionzip", "llava-1.5", 64
    )
    left = dict(plan.left_out)
    assert left["SIEVE at 64 tokens"] == "vtc has no SIEVE"
    assert "follows the image" in left["PruMerge at 192 tokens"]  # of which vtc has the method
    assert left["HoloV + RESTORE at 64 tokens"].startswith("vtc has holov, but not RESTORE")
    assert "server" in left["VQAv2"]
    # Every printed row is run or left out by name.
    for table in plan.tables:
        for row in table.rows:
            label = f"{row.name} at {row.tokens} tokens"
            assert (label in left) != any(row.method == p.method.name for p in plan.methods), label


def test_a_plan_is_what_vtc_eval_would_run(plan, tmp_path):
    settings = settings_of(plan, tmp_path, limit=4)
    cells = run_plan(settings)
    assert len(cells) == len(plan.tasks) * len(plan.methods)
    assert settings.model == "llava-hf/llava-1.5-7b-hf"
    assert {cell.method for cell in cells} == {planned.method for planned in plan.methods}


def _cell(method: vtc.Method, task: str, **figures: float) -> dict[str, Any]:
    cell = {
        "method": method.to_dict(), "task": task, "blind": False, "status": "done", "error": None,
        "samples": 7, "lmms_eval": {f"{k},none": v for k, v in figures.items()},
    }  # fmt: skip
    written: dict[str, Any] = json.loads(json.dumps(cell))  # as results.json has it
    return written


def test_differences_are_ours_minus_published_in_the_published_unit(plan):
    small = vtc.preset("sparsevlm", "llava-1.5", 64)  # has tuples, which JSON turns into lists
    results = {
        "cells": [
            _cell(small, "gqa", exact_match=0.548, exact_match_stderr=0.01),
            _cell(small, "mme", mme_perception_score=1300.0, mme_cognition_score=300.0),
            {**_cell(small, "pope"), "status": "failed", "error": "ValueError: no"},
            {**_cell(small, "scienceqa_img", exact_match=0.1), "blind": True},
        ]
    }
    rows = compare(results, plan.tables)
    assert len(rows) == sum(len(r.scores) for table in plan.tables for r in table.rows)
    mine = {
        row["benchmark"]: row
        for row in rows
        if (row["table"], row["name"], row["tokens"]) == ("restore", "SparseVLM", 64)
    }
    assert mine["GQA"]["published"] == 53.8
    assert mine["GQA"]["ours"] == pytest.approx(54.8)
    assert mine["GQA"]["difference"] == pytest.approx(1.0)
    assert mine["MME"]["difference"] == pytest.approx(1600 - 1591)
    assert mine["POPE"]["note"] == "failed: ValueError: no"
    assert mine["SQA"]["note"] == "not run"  # a blind run is not the method's
    assert mine["VQAv2"]["ours"] is None
    assert "server" in mine["VQAv2"]["note"]
    others = [row for row in rows if row["method"] is None]
    assert {row["note"] for row in others if row["name"] == "SpecFlow"} == {"vtc has no SpecFlow"}
    assert all(row["note"] for row in others)
    drawn = io.StringIO()
    Console(file=drawn, width=160).print(table_of(rows))
    assert "+1.0" in drawn.getvalue()
    assert "restore (re-run)" in drawn.getvalue()


def test_without_hub_and_checkpoint_it_stops_and_says_what_it_needs(plan, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("vtc.eval.harness.quiet.hub_answers", lambda: False)
    with pytest.raises(MissingError) as error:
        require(plan)
    assert len(error.value.needs) == 1 + len(plan.datasets)
    assert "hf download llava-hf/llava-1.5-7b-hf" in str(error.value)
    assert "hf download --repo-type dataset lmms-lab-encoder/GQA" in str(error.value)
    # A folder is no download; what is in the cache is not named.
    snapshot = tmp_path / "datasets--lmms-lab-encoder--GQA"
    (snapshot / "refs").mkdir(parents=True)
    (snapshot / "refs" / "main").write_text("a" * 40)
    (snapshot / "snapshots" / ("a" * 40)).mkdir(parents=True)
    needs = missing(plan, str(tmp_path))
    assert len(needs) == len(plan.datasets) - 1
    assert not any("GQA" in need or need.startswith("model") for need in needs)
    # With the hub at hand, what is missing can be fetched.
    monkeypatch.setattr("vtc.eval.harness.quiet.hub_answers", lambda: True)
    require(plan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format: expected 1, got 2"),
        ({"kind": "guessed"}, "kind: expected one of re-run, cited, got 'guessed'"),
        ({"model": "gpt"}, "model: expected one of llava-1.5-7b"),
        ({"arxiv": 7}, "arxiv: expected a text or null"),
        ({"paper": ""}, "paper: expected a text"),
        ({"rows": []}, "rows: expected at least one"),
        ({"more": 1}, "fields: expected"),
        ({"method": "fastvv"}, r"rows\[1\].method: unknown name 'fastvv'"),
        ({"tokens": 1.5}, r"rows\[1\].tokens: expected a whole number"),
        ({"scores": {"GQB": 1}}, r"rows\[1\].scores: expected one of GQA.*got 'GQB'"),
        ({"scores": {"GQA": "60"}}, r"rows\[1\].scores.GQA: expected a number, got '60'"),
        ({"note": "x"}, r"rows\[1\]: expected"),
        ({"method": None}, r"rows\[1\].why: goes with a method of null"),
        ({"why": "x"}, r"rows\[1\].why: goes with a method of null"),
        ({"name": "vanilla", "tokens": 576}, "rows: the same name and tokens twice"),
    ],
)
def test_a_table_that_is_not_as_said_is_refused_by_name(tmp_path, change, message):
    data = json.loads((FOLDER / "llava_1_5_7b_restore.json").read_text())
    whole = change.keys() & {"format", "kind", "model", "arxiv", "paper", "rows", "more"}
    (data if whole else data["rows"][1]).update(change)
    (tmp_path / "bad.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=f"bad.json: {message}"):
        load_tables("llava-1.5-7b", tmp_path)


def test_a_model_without_tables_is_refused():
    with pytest.raises(ValueError, match=r"name: unknown name 'llava'.*known are llava-1\.5-7b"):
        plan_reproduction("llava")
