# SPDX-License-Identifier: Apache-2.0
"""Running one cell: patch the model, evaluate with lmms-eval, collect the results."""

from __future__ import annotations

import json
import random
import time
import warnings
from collections.abc import Mapping
from typing import Any

from . import parallel
from .journal import Journal
from .loading import Tasks
from .plan import Cell, Settings
from .results import write
from .scoring import as_json, figures_of, samples_of, scores_of

__all__ = ["run_cell"]


def run_cell(
    cell: Cell,
    key: str,
    model: Any,
    tasks: Tasks,
    settings: Settings,
    versions: Mapping[str, str],
    setup: Mapping[str, Any],
) -> dict[str, Any]:
    """Run a cell and return it as in results.json, done or failed; if done, also write its files.

    Args:
        cell: the cell to run.
        key: its file name.
        model: lmms-eval's model object, unpatched before and after.
        tasks: tasks of the run.
        settings: settings of the run.
        versions: versions to record.
        setup: setup to record, which comparable cells have in common.
    """
    from lmms_eval.evaluator import simple_evaluate

    row: dict[str, Any] = {
        "key": key,
        "task": cell.task,
        "label": cell.label,
        "keep": cell.keep,
        "method": as_json(cell.method.to_dict()),
        "blind": cell.blind,
        "status": "failed",
        "error": None,
        "versions": dict(versions),
        "setup": dict(setup),
    }
    started = time.perf_counter()
    state = random.getstate()  # lmms-eval seeds the global generators
    model.vtc_journal = journal = Journal(
        settings.out / "journal",
        key,
        process=parallel.rank(),
        seed=settings.seed,
        batch=settings.batch_size,
    )
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default", UserWarning)
            model.vtc_apply(cell.method, blind=cell.blind)
        row["warnings"] = sorted({str(w.message) for w in caught})
        found = simple_evaluate(
            model=model,
            tasks=[cell.task],
            task_manager=tasks.manager,
            limit=tasks.limits[cell.task],
            batch_size=settings.batch_size,
            bootstrap_iters=0,  # intervals are computed here, from the samples
            log_samples=True,
            random_seed=settings.seed,
            numpy_random_seed=settings.seed,
            torch_random_seed=settings.seed,
            fewshot_random_seed=settings.seed,
            process_docs_parallel=1,
        )
        report = model.vtc_patch.report
        shared = [prefill for part in parallel.everyone(journal.prefills) for prefill in part]
        if parallel.rank() != 0:  # the first process has lmms-eval's results
            return {**row, "status": "done"}
        report.reset()
        for prefill in shared:
            report.add(prefill)
        samples = list(samples_of(found, cell.task))
        done = {
            **row,
            **scores_of(found, cell.task, samples),
            **figures_of(report),
            "seconds": round(time.perf_counter() - started, 3),
            "status": "done",
        }
        base = settings.out / "cells"
        lines = "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in samples)
        write(base / f"{key}.jsonl", lines)
        write(base / f"{key}.json", json.dumps(done, indent=1))
        journal.remove()
        return done
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"
        row["seconds"] = round(time.perf_counter() - started, 3)
        return row
    finally:
        random.setstate(state)
        model.vtc_journal = None
        model.vtc_apply(None)
