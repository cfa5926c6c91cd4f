# SPDX-License-Identifier: Apache-2.0
"""Writes a run of many methods as a Markdown page and a figure with one panel per method.

    vtc eval --methods todre,divprune,... --keep 0.25,0.1,0.05 --out results/methods
    python -m vtc.eval.analysis.methods_page results/methods eval/embedded

Each method is compared with random selection, pooling and down-sampling at equally many tokens,
averaged over the decoder layers, on the same samples (`page_tables.peer`). The page's text follows
from these tests.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtc.core.errors import ArgumentError
from vtc.core.spec import parse_method, takes_keep

from ..report.page_tables import LEVEL, SIMPLE, Cell, Logs, compare, done, peer
from . import stats

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw", "write"]

_PLAIN = ("full", "blind", *SIMPLE)
_INK, _GREY = "#0072B2", "#8C8C8C"


@dataclass(frozen=True)
class Verdict:
    """One method's run against one simple baseline.

    Attributes:
        other: the baseline's cell.
        test: the paired test.
        p: its p value, Holm-corrected over all tests of the page.
    """

    other: Cell
    test: stats.Paired
    p: float

    @property
    def says(self) -> int:
        """1 better, -1 worse, 0 no significant difference."""
        return 0 if self.p > LEVEL else 1 if self.test.difference > 0 else -1


def write(run: Path, out: Path) -> Path:
    """Write METHODS.md and methods.png.

    Args:
        run: folder that `vtc eval --out` wrote.
        out: folder for the page and the figure.

    Returns:
        The page's path.

    Raises:
        FileNotFoundError: `run` is not the folder of a run.
        ArgumentError: the run has several tasks, failed cells, or scores without intervals.
    """
    results = json.loads((run / "results.json").read_text("utf-8"))
    cells = results["cells"] = [_swept(cell) for cell in results["cells"]]
    tasks = {c["task"] for c in cells}
    if len(tasks) != 1 or len(done(cells)) != len(cells):
        failed = [c["label"] for c in cells if c["status"] != "done"]
        raise ArgumentError("run", f"expected one task and no failed cell, got {tasks}, {failed}")
    if any(c["interval"] is None for c in cells):
        raise ArgumentError("run", "expected scores with intervals, got a cell without")
    logs = {}
    for cell in cells:
        lines = (run / "cells" / f"{cell['key']}.jsonl").read_text("utf-8").splitlines()
        logs[cell["key"]] = {sample["id"]: sample for sample in map(json.loads, lines)}
    verdicts = judge(cells, logs)
    draw(cells).savefig(out / "methods.png")
    page = out / "METHODS.md"
    page.write_text(_page(results, verdicts), "utf-8")
    return page


def _swept(cell: Cell) -> Cell:
    """A baseline with its keep in the name, such as random:keep=0.45, as if it had been swept."""
    name, _, settings = cell["label"].partition(":")
    if name in SIMPLE and settings.startswith("keep="):
        return {**cell, "label": name, "keep": cell["method"]["keep"]}
    return cell


def judge(cells: Sequence[Cell], logs: Logs) -> dict[str, dict[str, Verdict]]:
    """The tests against the simple baselines, by key of each method's cell and by baseline."""
    found = []
    for cell in cells:
        if cell["label"] in _PLAIN:
            continue
        for label in SIMPLE:
            other = peer(cell, cells, label)
            test = other and compare(logs[cell["key"]], logs[other["key"]])
            if other and test:
                found.append((cell["key"], label, other, test))
    corrected = stats.holm([test.p for *_, test in found])
    verdicts: dict[str, dict[str, Verdict]] = {}
    for (key, label, other, test), p in zip(found, corrected, strict=True):
        verdicts.setdefault(key, {})[label] = Verdict(other, test, p)
    return verdicts


# ---- words --------------------------------------------------------------------------------------
def _name(cell: Cell) -> str:
    return str(cell["label"]).partition(":")[0]


def _stages(label: str) -> str:
    if label == "blind":
        return ""
    method = parse_method(label, 0.25 if takes_keep(label) else None, 0)
    return ", ".join(method.stages)


def _row(cell: Cell, verdicts: Mapping[str, Verdict]) -> list[str]:
    low, high = (100 * x for x in cell["interval"])
    row = [
        f"`{_name(cell)}`".replace("|", r"\|") if cell["label"] != "blind" else "blind",
        _stages(cell["label"]),
        "" if cell["keep"] is None else f"{cell['keep']:g}",
        f"{100 * cell['score']:.1f} [{low:.0f}, {high:.0f}]",
    ]
    tokens, flops = cell["tokens"], cell["flops"]
    if cell["label"] == "blind" or not tokens:
        row += [""] * 5
    else:
        row += [
            f"{tokens['out']:.0f}",
            f"{tokens['equivalent']:.0f}",
            f"{cell['kv_bytes'] / 2**20:.2f}",
            f"{flops['lm'] / 1e9:.2f}" if flops else "",
            f"{cell['ms']['selector']:.1f}",
        ]
    for label in SIMPLE:
        verdict = verdicts.get(label)
        if verdict is None:
            row.append("")
            continue
        mark = {1: "**", 0: "", -1: "_"}[verdict.says]
        keep = verdict.other["keep"]
        row.append(f"{mark}{100 * verdict.test.difference:+.1f}{mark} ({keep:g})")
    return row


_COLUMNS = (
    "method", "stage", "keep", "accuracy, % [95 %]", "tokens in", "tokens, mean", "KV, MiB",
    "LM, GFLOPs", "selector, ms", *(f"against {label}" for label in SIMPLE),
)  # fmt: skip


def _keeps(cells: Sequence[Cell]) -> list[str]:
    return [f"{c['keep']:g}" for c in cells if c["keep"] is not None]


def _groups(cells: Sequence[Cell], verdicts: Mapping[str, Mapping[str, Verdict]]) -> list[str]:
    """Sentences: methods better than all three baselines at every budget, at some, at none."""
    kinds: dict[str, dict[str, list[str]]] = {"all": {}, "some": {}, "none": {}}
    worse: list[str] = []
    alone: list[str] = []
    for label in dict.fromkeys(c["label"] for c in cells if c["label"] not in _PLAIN):
        mine = [c for c in cells if c["label"] == label]
        found = {c["key"]: verdicts.get(c["key"], {}).values() for c in mine}
        known = [c for c in mine if len(found[c["key"]]) == len(SIMPLE)]
        wins = [c for c in known if all(v.says > 0 for v in found[c["key"]])]
        kind = "all" if len(wins) == len(mine) else "some" if wins else "none"
        kinds[kind][f"`{_name(mine[0])}`"] = _keeps(wins)
        for group, inside in (
            (worse, [c for c in mine if any(v.says < 0 for v in found[c["key"]])]),
            (alone, [c for c in mine if c not in known]),
        ):
            if inside:
                keeps = ", ".join(_keeps(inside))
                group.append(f"`{_name(mine[0])}`" + (f" ({keeps})" if keeps else ""))
    lines = []
    if kinds["all"]:
        lines.append(f"Better than all three at every budget: {', '.join(kinds['all'])}.")
    if kinds["some"]:
        named = (f"{name} ({', '.join(where)})" for name, where in kinds["some"].items())
        lines.append(f"Better than all three at some budgets: {', '.join(named)}.")
    if kinds["none"]:
        lines.append(f"Better than all three at no budget: {', '.join(kinds['none'])}.")
    if worse:
        lines.append(f"Worse than at least one of the three: {', '.join(worse)}.")
    if alone:
        lines.append(f"Without all three baselines at equally many tokens: {', '.join(alone)}.")
    return lines


def _page(results: Mapping[str, Any], verdicts: Mapping[str, Mapping[str, Verdict]]) -> str:
    cells, settings = results["cells"], results["settings"]
    (samples,) = {c["samples"] for c in cells}
    order = {label: i for i, label in enumerate(_PLAIN)}
    ranked = sorted(cells, key=lambda c: (order.get(c["label"], 9), _name(c), -(c["keep"] or 0)))
    rows = [_row(c, verdicts.get(c["key"], {})) for c in ranked]
    line = "| {} |".format
    table = [line(" | ".join(_COLUMNS)), line(" | ".join("---" for _ in _COLUMNS))]
    table += [line(" | ".join(row)) for row in rows]
    machine = results.get("machine") or {}
    versions = cells[0]["versions"]
    keeps = ",".join(f"{k:g}" for k in settings["keeps"])
    lines = textwrap.wrap(", ".join(settings["methods"]), 84, break_on_hyphens=False)
    # Lines end in a comma and continue without a space.
    named = "\\\n    ".join(line.replace(", ", ",") for line in lines)
    words = "\n".join(f"- {text}" for text in _groups(ranked, verdicts))
    return f"""\
# All methods on the embedded VLM

Written by `python -m vtc.eval.analysis.methods_page`, from one run of {samples} generated questions
(`{cells[0]["task"]}`), greedy, exact match:

    vtc eval --methods \\
    {named} \\
    --keep {keeps} --tasks {cells[0]["task"]} --limit {settings["limit"]}

`keep` differs in meaning between methods (see their docstrings), so compare by tokens. *tokens in*:
vision tokens that enter the first decoder layer; *tokens, mean*: averaged over the layers. KV cache
and FLOPs are those of the language model's prefill, including text. *against*: percentage points
above (+) or below (-) random selection, pooling and down-sampling on the same questions, each at
the `keep` in brackets, which has the fewest tokens that are at least the method's, within 5 %.
**Bold** is better and _italic_ worse by McNemar's test with Holm's correction over all tests of
this page (p <= {LEVEL:g}).

![accuracy against tokens, one panel per method](methods.png)

{words}

This model is small, and its attention was supervised (`RECIPE.md`): the ranking of methods on a 7B
model may differ. It was trained on single images, so CATP's in-context prompts (`multi_dev` icl)
are not scored: tests cover only its properties and exactness there.

{chr(10).join(table)}

{", ".join(f"{name} {version}" for name, version in versions.items())}; \
{machine.get("cpu", "unknown")}, {machine.get("threads", "?")} threads.
"""


# ---- picture ------------------------------------------------------------------------------------
def draw(cells: Sequence[Cell]) -> Figure:
    """Small panels with common axes: each method in colour, over the simple baselines in grey."""
    from vtc.viz.plots import figure_of, token_axis

    cells = [_swept(cell) for cell in cells]
    labels = sorted({c["label"] for c in cells} - set(_PLAIN), key=lambda x: x.partition(":")[0])
    across = 6
    down = -(-len(labels) // across)
    figure = figure_of(13.0, 1.9 * down + 0.4)
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    ends = {c["label"]: c for c in cells if c["label"] in ("full", "blind")}
    for axes, label in zip(grid.flat, labels, strict=False):
        for name, dashes in (("full", "--"), ("blind", ":")):
            if name in ends:
                y = 100 * ends[name]["score"]
                axes.axhline(y, color="#404040", linewidth=0.9, linestyle=dashes, zorder=1)
                axes.annotate(
                    name, (0.02, y), xycoords=("axes fraction", "data"), xytext=(0, 1.5),
                    textcoords="offset points", fontsize=6.5, color="#404040",
                )  # fmt: skip
        for other, marker in zip(SIMPLE, "os^", strict=True):
            _line(axes, cells, other, color=_GREY, marker=marker, markersize=3, linewidth=0.8)
        _line(axes, cells, label, bars=True, color=_INK, marker="o", markersize=4.5, linewidth=1.6)
        axes.set_title(label.partition(":")[0], loc="left", fontsize=9.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=7.5)
    for axes in grid.flat[len(labels) :]:
        axes.set_visible(False)
    tokens = [c["tokens"]["equivalent"] for c in cells if c["tokens"] and c["label"] != "blind"]
    token_axis(grid[0][0], tokens, max(tokens))
    for axes in grid.flat[max(0, len(labels) - across) : len(labels)]:
        axes.tick_params(labelbottom=True)
    figure.supxlabel(
        "vision tokens of an image, mean over the layers; in grey random (circles), "
        "pool (squares), downsample (triangles)", fontsize=9,
    )  # fmt: skip
    figure.supylabel("accuracy, % (bars: 95 %)", fontsize=9)
    return figure


def _line(axes: Any, cells: Sequence[Cell], label: str, bars: bool = False, **style: Any) -> None:
    mine = [c for c in cells if c["label"] == label and c["tokens"]]
    mine.sort(key=lambda c: c["tokens"]["equivalent"])
    x, y = [c["tokens"]["equivalent"] for c in mine], [100 * c["score"] for c in mine]
    around = None
    if bars:
        around = [
            [100 * (c["score"] - c["interval"][0]) for c in mine],
            [100 * (c["interval"][1] - c["score"]) for c in mine],
        ]
    axes.errorbar(x, y, yerr=around, elinewidth=0.8, capsize=2, zorder=3 if bars else 2, **style)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write METHODS.md and methods.png for a run.")
    parser.add_argument("run", type=Path, help="folder that `vtc eval --out` wrote")
    parser.add_argument("out", type=Path, help="folder for the page and the figure")
    given = parser.parse_args()
    print(write(given.run, given.out))


if __name__ == "__main__":
    main()
