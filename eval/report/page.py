# SPDX-License-Identifier: Apache-2.0
"""The HTML report of a `vtc eval` run: plots, tables, tests, and samples with their kept tokens.

    python -m vtc.eval.report.page results        # writes results/report.html

The page is one self-contained file; its content security policy forbids fetching anything and
running any script but its own. It needs jinja2 and scipy, which come with
lmms-eval, and matplotlib.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vtc.core.errors import ArgumentError
from vtc.core.settings import check_whole

from ..harness.machine import machine
from ..harness.results import group_of, grouped
from ..harness.run import BASELINES, BadInput, plan
from .page_tables import Logs, chance, done, name_of, results_table, split, tests, types
from .viewer import choose, collect, settings_of

__all__ = ["machine", "write_page"]

NAME = "report.html"
SAMPLES = 16
"""Default number of samples per task in the viewer."""
_PICTURES = 3_500_000
"""Limit of characters for the samples, so that the page stays below 5 MB."""

_NONE = "–"
_FOLDER = Path(__file__).parent / "pages"


def write_page(out: Path, samples: int | None = None, trace: bool = True) -> Path:
    """Write `report.html` to a run's folder, from its results.json and logged samples.

    The page of an unfinished run, or one with failed cells, says so.

    Args:
        out: the folder that `vtc eval --out` wrote.
        samples: most samples per task in the viewer, first those on which methods
            differ, of each type of question; by default `SAMPLES`.
        trace: run the methods again to see which tokens they keep of these
            samples, if `samples.json` does not have them yet. Otherwise the viewer shows only what
            is there.

    Returns:
        The page's path.

    Raises:
        FileNotFoundError: no such folder.
        ArgumentError: `samples` below 0, or a results.json that is not of this version.
    """
    samples = SAMPLES if samples is None else samples
    check_whole("samples", samples)
    if not out.is_dir():
        raise FileNotFoundError(f"out: expected the folder of a run, got {out}")
    file = out / "results.json"
    if file.is_file():
        try:
            results = json.loads(file.read_text("utf-8"))
            known = results["format"] == 1
        except (ValueError, KeyError, TypeError) as error:
            raise ArgumentError("out", f"{file} is not a result of vtc eval ({error!r})") from error
        if not known:
            raise ArgumentError("out", f"expected format 1 in {file}, got {results['format']!r}")
        context = _context(out, results, samples, trace)
        written = datetime.fromtimestamp(file.stat().st_mtime, UTC)
        context["lead"] += f" Results of {written:%Y-%m-%d %H:%M} UTC."
    else:
        context = {
            "title": "vtc eval",
            "lead": "",
            "alerts": ["This folder holds no results.json: no cell of the run has finished yet."],
        }
    page = out / NAME
    unfinished = page.with_name(f".{NAME}.{os.getpid()}")
    unfinished.write_text(_render(context), "utf-8")
    os.replace(unfinished, page)
    return page


def _render(context: Mapping[str, Any]) -> str:
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    own: dict[str, str] = {}
    for name, suffix in (("style", "css"), ("script", "js")):
        text = (_FOLDER / f"report.{suffix}").read_text("utf-8")
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
        own |= {name: Markup(text), f"{name}_hash": f"sha256-{digest}"}
    empty: dict[str, Any] = {"plots": [], "tasks": [], "viewer": None, "viewer_notes": []}
    empty |= {"facts": [], "warnings": []}
    return environment.get_template("report.html.jinja").render({**empty, **context, **own})


# ---- the whole page -----------------------------------------------------------------------------
def _context(out: Path, results: Mapping[str, Any], samples: int, trace: bool) -> dict[str, Any]:
    cells = results["cells"]
    logs, lost = _logs(out, cells)
    alerts = _alerts(out, results)
    if lost:
        alerts.append(f"Samples are not logged, so there are no tests: {', '.join(lost)}.")
    tasks: list[dict[str, Any]] = []
    groups = grouped(cells)
    for number, (title, mine) in enumerate(groups, 1):
        constant = chance(mine, logs)
        failed = [c for c in mine if c["status"] != "done"]
        tasks.append(
            {
                "name": _title(title),
                "results": results_table(number, mine, constant),
                "failed": [(name_of(c), c["error"] or "unknown error") for c in failed],
                "tests": tests(number, mine, logs),
                "split": split(number, mine, logs),
                "types": types(number, mine, constant),
            }
        )
    chosen = {group_of(mine[0]): choose(done(mine), logs, samples) for _, mine in groups}
    wanted = {group: list(ids) for group, ids in chosen.items()}
    found = collect(out, results, wanted, trace) if samples and done(cells) else {}
    viewer, notes = _viewer(found, groups, logs, chosen)
    model = _public(results["model"]["id"])
    sizes = {c["samples"] for c in done(cells)}
    count = f", {max(sizes)} samples" if len(sizes) == 1 else ""
    return {
        "title": f"vtc eval: {model}",
        "lead": f"{', '.join(t['name'] for t in tasks) or 'No task'}{count}.",
        "alerts": alerts,
        "plots": list(filter(None, (_plot(title, mine) for title, mine in groups))),
        "tasks": tasks,
        "viewer": viewer,
        "viewer_notes": notes,
        "facts": _facts(results, model),
        "warnings": [(name_of(c), w) for c in cells for w in c.get("warnings") or ()],
    }


def _public(model: str) -> str:
    """A model's id, or only the name of a folder, as pages are shared."""
    return Path(model).name if model.startswith(("/", "~", ".")) or "\\" in model else model


def _logs(
    out: Path, cells: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, dict[str, dict[str, Any]]], list[str]]:
    """The logged samples by cell and id; and the cells without any."""
    logs, lost = {}, []
    for cell in done(cells):
        file = out / "cells" / f"{cell['key']}.jsonl"
        try:
            lines = file.read_text("utf-8").splitlines()
            logs[cell["key"]] = {s["id"]: s for s in map(json.loads, lines)}
        except (OSError, ValueError):
            lost.append(f"{cell['task']} {name_of(cell)}")
    return logs, lost


def _alerts(out: Path, results: Mapping[str, Any]) -> list[str]:
    cells = results["cells"]
    alerts = []
    failed = len(cells) - len(done(cells))
    if not done(cells):
        alerts.append("No cell of this run has finished.")
    if results.get("superseded"):
        alerts.append(
            f"{results['superseded']} older cells of other code or versions are left out; they are "
            "still in cells/."
        )
    if failed:
        alerts.append(f"{failed} of {len(cells)} cells failed; their errors are below.")
    try:
        planned = plan(settings_of(out, results))
    except (BadInput, KeyError, TypeError) as error:
        return [*alerts, f"Cannot check whether the run is complete: {error}"]
    there = {(c["task"], c["label"], c["keep"]) for c in cells}
    missing = [c for c in planned if (c.task, c.label, c.keep) not in there]
    if missing:
        names = (f"{c.task} {name_of(vars(c))}" for c in missing)
        alerts.append(
            f"This run is not complete: {len(missing)} of {len(planned)} cells are missing "
            f"({', '.join(names)}). Run the same command again to resume."
        )
    return alerts


def _title(title: str) -> str:
    """A group's title, with only the names of folders."""
    return " · ".join(map(_public, title.split(" · ")))


def _plot(title: str, cells: Sequence[Mapping[str, Any]]) -> dict[str, str] | None:
    """The trade-off plot of a group as a data URL, or `None` if there is nothing to draw.

    The legend is below the plot, so that it fits narrow screens.
    """
    import matplotlib

    from vtc.viz.plots import tradeoff

    drawn = io.BytesIO()
    # A fixed salt and no date give the same file for the same run.
    with matplotlib.rc_context({"svg.hashsalt": "vtc", "svg.fonttype": "path"}):
        try:
            figure = tradeoff({"cells": cells})
        except ValueError:
            return None
        height = 3.8
        for legend in figure.legends:
            handles = [handle for handle in legend.legend_handles if handle is not None]
            labels = [text.get_text() for text in legend.get_texts()]
            columns = max(1, min(4, 40 // (max(map(len, labels)) + 4)))
            legend.remove()
            figure.legend(
                handles,
                labels,
                ncols=columns,
                loc="outside lower center",
                frameon=False,
                fontsize=9,
            )
            height += 0.2 * -(-len(labels) // columns)
        figure.set_size_inches(5.2, height)
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    address = "data:image/svg+xml;base64," + base64.b64encode(drawn.getvalue()).decode("ascii")
    return {"name": _title(title), "address": address}


def _viewer(
    found: Mapping[str, Any],
    groups: Sequence[tuple[str, Sequence[Mapping[str, Any]]]],
    logs: Logs,
    chosen: Mapping[str, Mapping[str, bool]],
) -> tuple[dict[str, Any] | None, list[str]]:
    """The contents of the sample viewer, and notes on what is missing."""
    finished = [c for _, mine in groups for c in done(mine) if c["key"] in logs]
    if not finished or not any(chosen.values()):
        return None, []
    entries, left_out, size = [], 0, 0
    for title, mine in groups:
        group = group_of(mine[0])
        shown = found["samples"].get(group, {})
        for name, differs in chosen[group].items():
            entry = _sample(name, shown.get(name), group, finished, logs, found["kept"])
            if title != mine[0]["task"]:  # other setups may have the same sample
                entry["id"] = f"{name} ({_title(title)})"
            entry["differs"] = differs
            size += len(json.dumps(entry))
            if size > _PICTURES:
                left_out += 1
            else:
                entries.append(entry)
    notes = [f"Not all pictures or tokens are available. {text}" for text in found["problems"]]
    if left_out:
        notes.append(f"{left_out} samples are left out to keep the page small.")
    methods = (i for i, c in enumerate(finished) if c["label"] not in BASELINES)
    names = [{"name": name_of(c), "blind": c["blind"]} for c in finished]
    kinds = sorted({e["type"] for e in entries if e["type"] is not None})
    return {"samples": entries, "cells": names, "first": next(methods, 0), "types": kinds}, notes


def _sample(
    name: str,
    shown: Mapping[str, Any] | None,
    group: str,
    cells: Sequence[Mapping[str, Any]],
    logs: Logs,
    kept: Mapping[str, Any],
) -> dict[str, Any]:
    fields = ("question", "image", "size", "note")
    entry: dict[str, Any] = {"id": name, "truth": None, "type": None, "cells": {}}
    entry |= {k: None if shown is None else shown[k] for k in fields}
    for i, cell in enumerate(cells):
        logged = logs[cell["key"]].get(name)
        if group_of(cell) != group or logged is None:
            continue
        target = logged["target"]
        entry["truth"] = target if isinstance(target, str) else json.dumps(target)
        entry["type"] = logged["type"]
        said: dict[str, Any] = {"answer": logged["answer"].strip(), "score": logged["score"]}
        said["second"] = None
        second = kept.get(cell["key"], {}).get(name)
        if second is not None:
            said["grid"] = second["grid"]
            said["stages"] = [
                {"name": stage, "bits": text, "kept": int(text or "0", 16).bit_count()}
                for stage, text in second["stages"].items()
            ]
            if second["answer"].strip() != said["answer"]:
                said["second"] = second["answer"].strip()
        entry["cells"][i] = said
    return entry


def _facts(results: Mapping[str, Any], model: str) -> list[tuple[str, list[tuple[str, str]]]]:
    settings = results["settings"]
    keys = (
        "methods",
        "keeps",
        "tasks",
        "limit",
        "batch_size",
        "device",
        "dtype",
        "processes",
        "seed",
    )
    versions: dict[str, str] = {}
    for cell in results["cells"]:
        for name, version in (cell.get("versions") or {}).items():
            seen = versions.setdefault(name, version)
            if version not in seen.split(", "):
                versions[name] = f"{seen}, {version}"
    run = [("model", model), ("fingerprint", results["model"]["fingerprint"])]
    run += [("lmms-eval's class", results["model"]["lmms_eval"])]
    given = {**settings, **_where(results)}
    run += [(key.replace("_", " "), _plain(given[key])) for key in keys if key in given]
    seconds = sum(c.get("seconds") or 0 for c in results["cells"])
    run.append(("time of all cells", f"{seconds:.0f} s, without start, imports and this page"))
    where = results.get("machine")
    name = "Machine"
    if where is None:
        name, where = (
            "Machine that wrote this page (results.json does not name the run's)",
            machine(),
        )
    return [
        ("Settings", run),
        ("Versions", list(versions.items())),
        (name, [(key, _plain(value)) for key, value in where.items()]),
    ]


def _where(results: Mapping[str, Any]) -> dict[str, Any]:
    """Device, precision and processes actually used."""
    known: dict[str, Any] = {}
    for name in ("device", "dtype"):  # older results record these per cell only
        found = [(c.get("setup") or {}).get(name) for c in results["cells"]]
        if values := list(dict.fromkeys(value for value in found if value is not None)):
            known[name] = values
    ran = results.get("ran") or {}
    return known | {name: value for name, value in ran.items() if value is not None}


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    return _NONE if value is None else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, help="the folder that vtc eval wrote")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="samples per task to show")
    parser.add_argument(
        "--no-trace", action="store_true", help="do not run the model to find the kept tokens"
    )
    arguments = parser.parse_args()
    print(write_page(arguments.out, arguments.samples, not arguments.no_trace))


if __name__ == "__main__":
    main()
