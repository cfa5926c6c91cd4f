# SPDX-License-Identifier: Apache-2.0
"""`vtc eval`: evaluate every method, keep and task with lmms-eval.

A *cell* is one (method, keep, task). Cells run one after the other in this process, with
`lmms_eval.evaluator.simple_evaluate`, on one model that is loaded once and patched for each
cell. One process per cell would isolate them better, but importing lmms-eval takes ten seconds
and loading a 7 B model a minute, each time; unpatching restores the model bit for bit (tested), so
no cell affects the next.

In the output folder:

    results.json   what `run` returns: all cells of the folder (below)
    results.csv    the same with one row per cell
    cells/KEY.json, KEY.jsonl    one finished cell and its samples
    journal/       answers of unfinished cells; see `journal.py`
    data/          generated tasks, as parquet with its task files (for lmms-eval's
                   --include_path)
    log.txt        output of lmms-eval and its libraries

A finished cell does not run again: KEY is a hash of everything that its result depends on
(model, method, task and data, limit, seed, dtype, device, versions, vtc's code). KEY.json is moved
into place last, atomically, so a killed run leaves no partial cell; its answers so far are in
the journal and are not asked again. A cell that fails for any reason (a method, an image, a
full disk) is marked, and the others continue.

results.json:

    {"format": 1, "vtc": version,
     "settings": {...}, "model": {"id", "fingerprint", "lmms_eval"},     of the latest run
     "ran": {"device", "dtype", "processes"},     as actually used; "dtype" is null if the
                                     checkpoint's own applied and nothing was left to run
     "run": [...],                   keys of the cells of this run
     "superseded": number,           older cells of the same names, by other code or versions, that
                                     are still in cells/ but not in this list:
     "cells": [{
        "key", "task", "label",      label: "todre", "fastv:layer=3", "blind"
        "keep",                      the swept keep, null for methods without one
        "method",                    `Method.to_dict()`
        "blind",                     whether the images were grey
        "status", "error",           "done", or "failed" and why
        "metric", "score",           lmms-eval's figure for the task's first metric
        "interval",                  95 %, from the samples; null if the metric is not their mean
                                     (MME)
        "samples",                   number of samples
        "by_type",                   {type: {"score", "interval", "samples"}} if rows have types
        "loyalty",                   agreement: fraction of answers equal to those of "full"; null
                                     without it
        "hard",                      {"samples", "score"} on the samples that "full" gets right and
                                     "downsample" at the same keep wrong (group A of VTC-Bench,
                                     ACL 2026); null without both
        "lmms_eval",                 all figures of lmms-eval for the task
        "tokens",                    {"in", "out", "per_layer", "equivalent"}: vision tokens of an
                                     image before compression, into the first decoder layer,
                                     processed by each, and the mean over the layers
        "flops",                     {"vision", "projector", "lm", "total"} of one sample's prefill,
                                     2 per multiply-add (see `vtc.cost`); null if unknown
        "kv_bytes",                  keys and values of one sample after prefill
        "ms",                        {"vision", "selector", "lm"}: medians over prefills (batches);
                                     lm is the language model's prefill without the selector
        "seconds",                   time of the whole cell
        "setup",                     what comparable cells have in common: model, class of
                                     lmms-eval, limit, batch size, seed, dtype, device, data
        "versions", "warnings"}]}

Runs in one folder accumulate. Cells of other models, limits, seeds and so on are kept together, but
compared only within their group.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import vtc

from ..tasks import OWN_TASKS
from . import parallel
from .cell import run_cell
from .folder import REMEMBERED, check_out, prepared
from .identity import FileHashes, code_of_method, installed_versions, named_files, shared_code
from .loading import Source, Tasks, check_source, find_source, load, write_task
from .plan import (
    BASELINES,
    DTYPES,
    BadInput,
    Cell,
    Observer,
    Settings,
    plan,
    with_task_files,
)
from .quiet import hub_answers, offline, quiet
from .ready import import_lmms_eval
from .results import write_results
from .scoring import as_json

__all__ = [
    "BASELINES",
    "DTYPES",
    "OWN_TASKS",
    "BadInput",
    "Cell",
    "Observer",
    "Settings",
    "check",
    "plan",
    "run",
    "write_task",
]


def check(settings: Settings) -> list[Cell]:
    """The cells of a run, after all checks that do not need lmms-eval.

    Raises:
        BadInput: an invalid setting; nothing was written.
    """
    settings = with_task_files(settings)
    cells = plan(settings)
    check_out(settings.out)
    check_source(settings)
    return cells


def run(settings: Settings, observer: Observer | None = None) -> dict[str, Any]:
    """Run all unfinished cells and write the output folder (see the module's docstring).

    A cell that fails is marked, and the others continue.

    Args:
        settings: what to run.
        observer: receives the progress.

    Returns:
        The contents of results.json.

    Raises:
        BadInput: an invalid setting, before anything runs; or, at the end, the results could not
            be written (a full disk), and the message names the failed cells.
    """
    from .machine import machine

    observer = observer or Observer()
    settings = with_task_files(settings)
    cells = check(settings)
    local = settings.model is None or Path(settings.model).expanduser().is_dir()
    all_local = local and all(task in OWN_TASKS for task in settings.tasks)
    number = parallel.rank()
    log = settings.out / ("log.txt" if number == 0 else f"log.{number}.txt")
    with prepared(settings.out, log):
        with quiet(log):
            if "lmms_eval.evaluator" not in sys.modules:
                observer.stage("importing lmms-eval")
            import_lmms_eval()
        with quiet(log), offline(all_local or not hub_answers()):
            parallel.start(settings.device)
            observer.stage("looking at the model")
            hashes = FileHashes(settings.out / REMEMBERED)
            source = find_source(settings, hashes)
            observer.stage("preparing the data")
            tasks = Tasks(settings, source, hashes)
            versions = installed_versions(source.arguments)
            setups = {task: setup_of(task, settings, source, tasks) for task in tasks.data}
            context = {
                "versions": {k: v for k, v in versions.items() if k != "vtc"},  # its code is hashed
                "code": shared_code(),
            }
            keys = parallel.from_first(
                lambda: [_key(cell, {**setups[cell.task], **context}, hashes) for cell in cells]
            )
            # Decided by one process, as all must agree on what to run.
            rows: list[dict[str, Any] | None] = parallel.from_first(
                lambda: [
                    _finished(settings.out, cell, key)
                    for cell, key in zip(cells, keys, strict=True)
                ]
            )
            todo = [i for i, row in enumerate(rows) if row is None]
            # `advanced` counts only this process's samples.
            shares = [math.ceil(n / parallel.world()) for n in tasks.samples.values()]
            share = dict(zip(tasks.samples, shares, strict=True))
            total = sum(share[cells[i].task] for i in todo)
            observer.planned(total, len(cells), len(cells) - len(todo))
            model = None
            if todo:
                observer.stage("loading the model")
                model = load(source, settings, simple=not tasks.generation_only)
                model.vtc_progress = observer.advanced
            head = {
                "format": 1,
                "vtc": vtc.__version__,
                "settings": as_json({**vars(settings), "model": source.id}),
                "model": source.summary,
                "ran": _ran(source, model),
                "machine": machine(source.device),
            }
            for i in todo:
                cell = cells[i]
                observer.stage(_title(cell))
                setup = setups[cell.task]
                rows[i] = run_cell(cell, keys[i], model, tasks, settings, versions, setup)
                observer.finished(rows[i] or {})
                with contextlib.suppress(OSError):  # a full disk; only the last write matters
                    so_far = [row for row in rows if row is not None]
                    write_results(settings.out, {**head, "cells": so_far})
    results = {**head, "cells": [r for r in rows if r is not None]}
    try:
        results = write_results(settings.out, results)
    except OSError as error:
        failed = [
            f"{_title(cells[i])}: {r['error']}" for i, r in enumerate(rows) if r and r["error"]
        ]
        raise BadInput(
            "--out",
            f"the results could not be written ({type(error).__name__}: {error}). Finished cells "
            f"are in {settings.out / 'cells'} and will be reused. "
            f"Failed cells: {'; '.join(failed) or 'none'}",
        ) from error
    parallel.everyone(None)  # no process may exit while the first still writes
    return results


def _ran(source: Source, model: Any) -> dict[str, Any]:
    """The device, precision and processes actually used."""
    dtype = source.dtype
    if dtype is None and model is not None:  # the checkpoint's own
        dtype = str(getattr(model.model, "dtype", None) or "").removeprefix("torch.") or None
    return {"device": source.device, "dtype": dtype, "processes": parallel.world()}


def _title(cell: Cell) -> str:
    keep = "" if cell.keep is None else f" keep {cell.keep:g}"
    return f"{cell.task}: {cell.label}{keep}"


def setup_of(task: str, settings: Settings, source: Source, tasks: Tasks) -> dict[str, Any]:
    """What comparable cells of a task have in common."""
    found: dict[str, Any] = as_json(
        {
            **source.summary,
            "prompts": source.prompts,
            # Other kinds of tasks in the run make lmms-eval use another class.
            "chat": tasks.generation_only,
            "model_args": dict(source.arguments),
            "limit": tasks.limits[task],
            "batch_size": settings.batch_size,
            "seed": settings.seed,
            "dtype": source.dtype,
            "device": source.device.partition(":")[0],
            "data": tasks.data[task],
        }
    )
    return found


def _key(cell: Cell, context: dict[str, Any], hashes: FileHashes) -> str:
    own = {
        "code of method": code_of_method(cell.method),
        "files of method": named_files(cell.method.to_dict(), hashes),  # trained weights
    }
    # The same files with another name are the same model.
    return cell.key({**{k: v for k, v in context.items() if k != "id"}, **own})


def _finished(out: Path, cell: Cell, key: str) -> dict[str, Any] | None:
    """The cell as written when it finished, or `None`."""
    file = out / "cells" / f"{key}.json"
    if not file.is_file() or not file.with_suffix(".jsonl").is_file():
        return None
    row: dict[str, Any] = json.loads(file.read_text("utf-8"))
    # "todre:keep=0.1" and "todre" with keep 0.1 are one cell, under either name.
    return {**row, "label": cell.label, "keep": cell.keep}
