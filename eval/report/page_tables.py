# SPDX-License-Identifier: Apache-2.0
"""The tables of a run's page: results, tests, the VTC-Bench split, types of questions.

Cells are those of results.json; logs are their samples, by cell key and sample id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vtc.core.figures import three_digits

from ..analysis import stats
from ..harness.run import BASELINES
from .table import runs

__all__ = ["Cell", "Logs", "Row", "Table", "Value", "chance", "compare", "done", "name_of", "peer"]
__all__ += ["results_table", "split", "tests", "types"]

SIMPLE = ("random", "pool", "downsample")
"""Baselines that every method is tested against, at equally many tokens (`peer`)."""
REFERENCES = ("full", *SIMPLE)

LEVEL = 0.05
_NONE = "–"

Cell = Mapping[str, Any]
Logs = Mapping[str, Mapping[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Value:
    """One table entry: its text and its sort key (`None`: always last)."""

    text: str
    sort: float | str | None = None
    style: str = ""


@dataclass(frozen=True)
class Row:
    values: list[Value]
    style: str = ""


@dataclass(frozen=True)
class Table:
    """A sortable table; `columns` are (name, whether numeric)."""

    id: str
    title: str
    columns: tuple[tuple[str, bool], ...]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)


def _text(text: str, style: str = "") -> Value:
    return Value(text, text, style)


def _number(value: float | None, form: str = ".1f", scale: float = 1.0) -> Value:
    return Value(_NONE) if value is None else Value(f"{scale * value:{form}}", scale * value)


def _digits(value: float | None, scale: float) -> Value:
    """To three digits."""
    return Value(_NONE) if value is None else Value(three_digits(scale * value), scale * value)


def _range(interval: Sequence[float] | None, form: str = ".1f") -> Value:
    """An interval in percent or percentage points, sorted by its lower end."""
    if interval is None:
        return Value(_NONE)
    low, high = (100 * x for x in interval)
    return Value(f"{low:{form}} to {high:{form}}", low)


def _p(value: float) -> Value:
    return Value("< 0.001" if value < 0.001 else f"{value:.3f}", value)


def _named(cell: Mapping[str, Any]) -> list[Value]:
    return [_text(cell["label"]), _number(cell["keep"], "g")]


def name_of(cell: Mapping[str, Any]) -> str:
    """A cell's method with its keep."""
    return cell["label"] if cell["keep"] is None else f"{cell['label']} keep {cell['keep']:g}"


def _tokens(cell: Mapping[str, Any]) -> float | None:
    return cell["tokens"]["equivalent"] if cell.get("tokens") else None


def done(cells: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The finished cells."""
    return [c for c in cells if c["status"] == "done"]


def results_table(
    number: int, cells: Sequence[Mapping[str, Any]], constant: stats.Constant | str
) -> Table:
    finished = done(cells)
    percent = all(c["interval"] is not None for c in finished if c["score"] is not None)
    flops = [c["flops"]["lm"] for c in finished if c.get("flops") and c["flops"]["lm"] is not None]
    scale, unit = (1e12, "TFLOPs") if max(flops, default=0) >= 1e12 else (1e9, "GFLOPs")
    score = "accuracy, %" if percent else next((c["metric"] for c in finished), "score")
    numeric = (score, "95 % interval", "same as full, %", "tokens, mean")
    after = (f"LM, {unit}", "KV cache, MiB", "prefill, ms", "selector, ms", "samples")
    columns = (
        ("method", False),
        ("keep", True),
        *((name, True) for name in numeric),
        ("tokens × layers", False),
        *((name, True) for name in after),
    )
    rows = []
    for cell in cells:
        if cell["status"] != "done":
            blank = [Value(_NONE)] * (len(columns) - 3)
            rows.append(Row([*_named(cell), Value("failed", style="bad"), *blank], "failed"))
            continue
        scores, ms = 100.0 if percent else 1.0, cell.get("ms") or {}
        lm = cell["flops"]["lm"] if cell.get("flops") else None
        layers = runs(cell["tokens"]["per_layer"]) if cell.get("tokens") else None
        values = [
            *_named(cell),
            _number(cell["score"], ".1f" if percent else ".4g", scores),
            _range(cell["interval"]) if percent else Value(_NONE),
            _number(cell.get("loyalty"), ".1f", 100),
            _number(_tokens(cell)),
            Value(_NONE) if layers is None else _text(layers),
            _digits(lm, 1 / scale),
            _digits(cell.get("kv_bytes"), 2**-20),
            _number(ms.get("lm")),
            _number(ms.get("selector"), ".2f"),
            _number(cell["samples"], ".0f"),
        ]
        rows.append(Row(values, "baseline" if cell["label"] in BASELINES else ""))
    notes = [
        "blind: with grey images. same as full: agreement, the fraction of answers equal to those "
        "of the full model. tokens, mean: vision tokens of an image, averaged over the language "
        "model's layers; compare methods at equal tokens. prefill: the language model's, without "
        "the selector; medians. FLOPs and KV cache: of one sample's prefill, 2 FLOPs per "
        "multiply-add. Intervals: Wilson's if scores are 0 or 1, otherwise a bootstrap; over "
        "samples, not over the seeds of sampling methods."
    ]
    if isinstance(constant, str):
        notes.append(f"chance: {constant}")
    elif percent:
        values = [_text("chance"), Value(_NONE), _number(constant.score, ".1f", 100)]
        values += [Value(_NONE)] * (len(columns) - 4)
        total = sum(n for _, _, n in constant.answers.values())
        rows.append(Row([*values, _number(total, ".0f")], "baseline"))
        kinds = (
            f"{'' if kind is None else f'{kind}: '}“{answer}” ({right} of {n})"
            for kind, (answer, right, n) in sorted(
                constant.answers.items(), key=lambda x: str(x[0])
            )
        )
        notes.append(
            "chance: always the most frequent right answer of the question's type; an upper bound, "
            f"as it is counted on these samples: {'; '.join(kinds)}."
        )
    return Table(f"results-{number}", "Results", columns, rows, notes)


def chance(cells: Sequence[Mapping[str, Any]], logs: Logs) -> stats.Constant | str:
    """The best constant answers, or why they are unknown."""
    known = [logs[c["key"]] for c in done(cells) if c["key"] in logs]
    if not known:
        return "unknown, as no samples are logged."
    for samples in known:
        for sample in samples.values():
            target, score = sample["target"], sample["score"]
            plain = isinstance(target, str) and score is not None
            if not plain or score != stats.is_match(sample["answer"], target):
                return (
                    "not computed, as this task does not compare answers with a single right one."
                )
    return stats.best_constant((s["type"], s["target"]) for s in known[0].values())


def peer(cell: Cell, others: Sequence[Cell], label: str) -> Cell | None:
    """The run of `label` to compare `cell` with: the one with the fewest tokens, averaged over the
    layers, that are at least the cell's. 5 % fewer are accepted, as grids round.
    """
    tokens = _tokens(cell)
    if tokens is None:
        return None
    least = 0.95 * tokens
    found = [c for c in others if c["label"] == label and (_tokens(c) or 0.0) >= least]
    return min(found, key=lambda c: _tokens(c) or 0.0, default=None)


def compare(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> stats.Paired | None:
    """Paired test of two logs on the samples that both scored."""
    common = [k for k in mine if k in theirs and None not in _both(mine[k], theirs[k])]
    if not common:
        return None
    ours, against = ([log[k]["score"] for k in common] for log in (mine, theirs))
    return stats.paired(ours, against)


def tests(number: int, cells: Sequence[Cell], logs: Logs) -> Table | None:
    """Every method against `full`, and against the simple baselines at its number of tokens."""
    finished = [c for c in done(cells) if c["key"] in logs and c["interval"] is not None]
    pairs, alone = [], []
    for cell in finished:
        if cell["label"] in BASELINES:
            continue
        simple = [peer(cell, finished, label) for label in SIMPLE]
        others = [c for c in finished if c["label"] == "full"] + [c for c in simple if c]
        pairs += [(cell, other) for other in others]
        if not all(simple):
            alone.append(name_of(cell))
    found = []
    for cell, other in pairs:
        test = compare(logs[cell["key"]], logs[other["key"]])
        if test is not None:
            found.append((cell, other, test))
    if not found:
        return None
    corrected = stats.holm([test.p for _, _, test in found])
    rows = []
    for (cell, other, test), q in zip(found, corrected, strict=True):
        if q > LEVEL:
            says = Value("no significant difference", "b")
        elif test.difference > 0:
            says = Value("better", "a", "good")
        else:
            says = Value("worse", "c", "bad")
        values = [
            *_named(cell),
            _text(other["label"]),
            says,
            _number(test.difference, "+.1f", 100),
            _range(test.interval, "+.1f"),
            _number(test.wins, ".0f"),
            _number(test.losses, ".0f"),
            _p(test.p),
            _p(q),
            _number(_tokens(cell)),
            _number(_tokens(other)),
            _number(test.samples, ".0f"),
        ]
        rows.append(Row(values))
    kinds = sorted({test.test for _, _, test in found})
    how = {
        "McNemar": "McNemar's exact test (scores of 0 and 1; intervals after Agresti and Min 2005)",
        "permutation": "a paired permutation test with 9999 draws (bootstrap intervals)",
    }
    notes = [
        f"Two-sided p by {' or '.join(how[kind] for kind in kinds)}; p, Holm: corrected after Holm "
        f"1979 for the {len(found)} tests of this table. Better and worse: corrected p of at most "
        f"{LEVEL:g}; intervals are not corrected. higher, lower: number of samples on which the "
        "method scores higher or lower. random, pool and downsample have the fewest tokens, "
        "averaged over the layers, that are at least the method's, within 5 %."
    ]
    if alone:
        notes.append(f"Not every baseline ran at the same number of tokens: {', '.join(alone)}.")
    names = (("method", False), ("keep", True), ("against", False), ("it is", False))
    numbers = (
        "difference, points", "95 % interval", "higher", "lower", "p", "p, Holm", "tokens",
        "other's tokens", "samples",
    )  # fmt: skip
    columns = (*names, *((name, True) for name in numbers))
    return Table(f"tests-{number}", "Tests on the same samples", columns, rows, notes)


def _both(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[Any, Any]:
    return mine["score"], theirs["score"]


def split(number: int, cells: Sequence[Mapping[str, Any]], logs: Logs) -> Table | None:
    """Scores on samples that the full model gets right and down-sampling wrong (group A), and on
    those that both get right (B)."""
    finished = [c for c in done(cells) if c["key"] in logs and c["interval"] is not None]
    full = next((logs[c["key"]] for c in finished if c["label"] == "full"), None)
    small = {c["keep"]: logs[c["key"]] for c in finished if c["label"] == "downsample"}
    rows = []
    for cell in finished:
        if full is None or cell["keep"] not in small or cell["label"] == "downsample":
            continue
        mine, smaller = logs[cell["key"]], small[cell["keep"]]
        values = _named(cell)
        for wanted in (0, 1):
            group = [
                mine[k]["score"]
                for k in mine
                if k in full
                and k in smaller
                and _both(full[k], smaller[k]) == (1, wanted)
                and mine[k]["score"] is not None
            ]
            values += [
                _number(len(group), ".0f"),
                _number(sum(group) / len(group) if group else None, ".1f", 100),
                _range(stats.interval(group) if group else None),
            ]
        rows.append(Row(values, "baseline" if cell["label"] in BASELINES else ""))
    if not rows:
        return None
    notes = [
        "After VTC-Bench (ACL 2026): of the samples that the full model gets right, down-sampling "
        "at the same keep gets group A wrong and group B right. Group A shows what a method gains "
        "over a smaller image. VTC-Bench shrinks the image; here “downsample” shrinks the grid of "
        "features, which works with every model."
    ]
    parts = ("samples", "accuracy, %", "95 % interval")
    columns = tuple((f"{group}: {part}", True) for group in "AB" for part in parts)
    head = (("method", False), ("keep", True))
    title = "Samples that need the tokens (VTC-Bench split)"
    return Table(f"split-{number}", title, (*head, *columns), rows, notes)


def types(
    number: int, cells: Sequence[Mapping[str, Any]], constant: stats.Constant | str
) -> Table | None:
    finished = [c for c in done(cells) if c.get("by_type")]
    kinds = list(dict.fromkeys(kind for c in finished for kind in c["by_type"]))
    if not kinds:
        return None
    rows = []
    for cell in finished:
        scores = (cell["by_type"].get(kind, {}).get("score") for kind in kinds)
        values = [*_named(cell), *(_number(score, ".1f", 100) for score in scores)]
        rows.append(Row(values, "baseline" if cell["label"] in BASELINES else ""))
    if isinstance(constant, stats.Constant):
        counts = (constant.answers.get(kind) for kind in kinds)
        shares = [None if found is None else found[1] / found[2] for found in counts]
        values = [_text("chance"), Value(_NONE), *(_number(x, ".1f", 100) for x in shares)]
        rows.append(Row(values, "baseline"))
    sizes = {k: v["samples"] for c in finished for k, v in c["by_type"].items()}
    head = (("method", False), ("keep", True))
    columns = (*head, *((f"{kind} ({sizes[kind]})", True) for kind in kinds))
    title = "Accuracy by type of question, % (number of samples)"
    return Table(f"types-{number}", title, columns, rows)
