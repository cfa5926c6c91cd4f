# SPDX-License-Identifier: Apache-2.0
"""`vtc autotune`: the cheapest method and keep within an allowed loss of accuracy.

Candidates, each a method with a keep, race. All answer a few samples, as does the full model; those
that clearly lose more than allowed drop out, and the others answer twice as many, until one is
certain, none is left, or the samples are used up (successive halving with a test instead of a
fixed half, so that good candidates are not halved needlessly).

*Loss* is the full model's accuracy minus the candidate's, as a mean over the tasks, tested on
paired differences: most samples get the same answer from both, and their noise cancels. *Cost* is
the language model's prefill FLOPs. In each round a candidate is

    "lost"       if the loss exceeds the allowed one even at the interval's lower end,
    "held"       if it is within the allowed one even at the upper end,
    "costlier"   if a cheaper one has held already,
    "open"       otherwise.

The intervals hold for all rounds together (Bonferroni), not for all candidates together: of twenty
candidates at 95 %, one may be misjudged. The *winner* is the cheapest that held; without one, the
cheapest whose measured loss is allowed, and `certain` is then false.

Rounds are runs of `vtc.eval.harness.run` with a limit. A limit is part of a cell's key, so a round
repeats the samples of smaller ones; as rounds double, this at most doubles the work. A killed race
resumes at the cell where it stopped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist
from typing import Any

from vtc.core.errors import ArgumentError
from vtc.core.figures import three_digits
from vtc.core.spec import Keep, compact, parse_method, split_list, takes_keep

from ..report.table import FULL_WIDTH, named
from .plan import of_method
from .results import logged as logged_samples
from .results import of_this_run, write
from .run import BadInput, Observer, Settings, run

__all__ = [
    "Measured",
    "Race",
    "Round",
    "autotune",
    "decide",
    "frontier",
    "paired_interval",
    "race",
    "rounds",
    "table",
    "winner",
]


# ---- the decisions ------------------------------------------------------------------------------
@dataclass(frozen=True)
class Measured:
    """One round's result for one candidate; scores and losses are fractions, 0.01 is one point.

    Attributes:
        name: the method as text, including its keep.
        cost: language model FLOPs of one sample's prefill, mean over the tasks.
        score: mean over the tasks.
        loss: the full model's score minus this one's, on the same samples.
        low, high: interval of the loss.
        samples: number over all tasks.
        ms: prefill with the selector, milliseconds; `None` if not measured.
    """

    name: str
    cost: float
    score: float
    loss: float
    low: float
    high: float
    samples: int
    ms: float | None = None


def paired_interval(
    differences: Sequence[Sequence[float]], confidence: float
) -> tuple[float, float, float]:
    """Mean paired difference over tasks, and its interval.

    Agresti and Min (2005, Statistics in Medicine 24), generalised to differences in [-1, 1]: two
    samples are added to each task, half of one a gain, half a loss, so that a few agreeing samples
    do not look certain. With right or wrong answers it is exactly their interval.

    Args:
        differences: one sequence for each task.
        confidence: in (0, 1).

    Returns:
        (mean, low, high); the interval is around the shrunken mean and always holds the mean.

    Raises:
        ArgumentError: no task, a task without samples, or a difference beyond [-1, 1].
    """
    if not differences or not all(differences):
        raise ArgumentError("differences", "expected samples of at least one task, got none")
    means, centres, variances = [], [], []
    for task in differences:
        if not all(-1.0 <= d <= 1.0 for d in task):
            raise ArgumentError("differences", "expected all within [-1, 1]: scores are fractions")
        n = len(task) + 2
        centre = math.fsum(task) / n
        square = (math.fsum(d * d for d in task) + 1) / n
        means.append(math.fsum(task) / len(task))
        centres.append(centre)
        variances.append(max(square - centre * centre, 0.0) / n)
    count = len(differences)
    mean, centre = math.fsum(means) / count, math.fsum(centres) / count
    half = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(math.fsum(variances)) / count
    return mean, min(centre - half, mean), max(centre + half, mean)


def decide(measured: Sequence[Measured], allowed: float) -> dict[str, str]:
    """ "lost", "held", "costlier" or "open" for each candidate; see the module's docstring."""
    held = [m.cost for m in measured if m.high <= allowed]
    cheapest = min(held, default=math.inf)
    verdicts = {}
    for m in measured:
        if m.low > allowed:
            verdicts[m.name] = "lost"
        elif m.cost > cheapest:
            verdicts[m.name] = "costlier"
        else:
            verdicts[m.name] = "held" if m.high <= allowed else "open"
    return verdicts


def winner(measured: Sequence[Measured], allowed: float) -> tuple[Measured | None, bool]:
    """(the cheapest that held, true), or (the cheapest whose measured loss is allowed, false).

    Ties in cost go to the smaller loss; (`None`, false) if all lose too much.
    """

    def rank(m: Measured) -> tuple[float, float, str]:
        return m.cost, m.loss, m.name

    held = [m for m in measured if m.high <= allowed]
    if held:
        return min(held, key=rank), True
    return min((m for m in measured if m.loss <= allowed), key=rank, default=None), False


def frontier(measured: Sequence[Measured]) -> list[Measured]:
    """Candidates that no other beats in both cost and loss, the cheapest first."""
    best: list[Measured] = []
    for m in sorted(measured, key=lambda m: (m.cost, m.loss, m.name)):
        if not best or m.loss < best[-1].loss:
            best.append(m)
    return best


def rounds(start: int, most: int) -> list[int]:
    """Samples per task in each round: `start`, doubled up to `most`, the last one.

    Raises:
        ArgumentError: not 1 <= start <= most.
    """
    if not 1 <= start <= most:
        raise ArgumentError("start", f"expected 1 to {most}, the most samples, got {start}")
    sizes = [start]
    while sizes[-1] * 2 < most:
        sizes.append(sizes[-1] * 2)
    return sizes if sizes[-1] == most else [*sizes, most]


@dataclass(frozen=True)
class Round:
    """One round: samples per task, measurements and verdicts."""

    limit: int
    measured: tuple[Measured, ...]
    verdicts: Mapping[str, str]


@dataclass(frozen=True)
class Race:
    """All rounds and the outcome.

    Attributes:
        latest: the last measurement of each candidate, with different numbers of samples.
        winner: see `winner`; only candidates that were never dropped.
    """

    rounds: tuple[Round, ...]
    latest: Mapping[str, Measured]
    winner: Measured | None
    certain: bool


Measure = Callable[[Sequence[str], int, float], tuple[Sequence[Measured], bool]]
"""(candidates, samples per task, confidence) -> measurements, and whether the tasks have
more samples. Failed candidates are left out."""


def race(
    names: Sequence[str],
    measure: Measure,
    allowed: float,
    sizes: Sequence[int],
    confidence: float = 0.95,
) -> Race:
    """Run rounds until a winner is certain, no candidate is left, or the samples are used up.

    Args:
        names: the candidates.
        measure: runs a round.
        allowed: allowed loss, a fraction.
        sizes: samples per task in each round; see `rounds`.
        confidence: probability that a candidate is not misjudged in any round.
    """
    each = 1 - (1 - confidence) / len(sizes)
    left = list(dict.fromkeys(names))
    done: list[Round] = []
    latest: dict[str, Measured] = {}
    now: Sequence[Measured] = ()
    for limit in sizes:
        now, more = measure(left, limit, each)
        verdicts = decide(now, allowed)
        done.append(Round(limit, tuple(now), verdicts))
        latest |= {m.name: m for m in now}
        left = [name for name in left if verdicts.get(name) in ("held", "open")]
        # `all` is also true if none is left.
        if not more or all(verdicts[name] == "held" for name in left):
            break
    alive = [m for m in now if m.name in left]
    best, certain = winner(alive, allowed)
    return Race(tuple(done), latest, best, certain)


# ---- candidates and rounds on real tasks --------------------------------------------------------
def candidates(methods: Sequence[str], keeps: Sequence[Keep]) -> list[str]:
    """Each method with each keep written into its text: "todre", 0.1 is "todre:keep=0.1".

    Raises:
        BadInput: an invalid method or keep, or none.
    """
    if not methods:
        raise BadInput("--methods", "expected at least one method, got none")
    found: list[str] = []
    for text in methods:
        try:
            if not takes_keep(text):
                parse_method(text)
                found.append(text)
                continue
            if not keeps:
                raise BadInput("--keep", f"expected a value for {text}, got none")
            found += [_with_keep(text, keep) for keep in keeps]
        except BadInput:
            raise
        except (ValueError, TypeError) as error:
            raise of_method(error, text) from error
    return list(dict.fromkeys(found))


def _with_keep(text: str, keep: Keep) -> str:
    wanted = parse_method(text, keep)
    parts = split_list(compact(text), "|")
    for i, part in enumerate(parts):
        if takes_keep(part):
            whole = "|".join([*parts[:i], f"{part}:keep={keep!r}", *parts[i + 1 :]])
            assert parse_method(whole) == wanted
            return whole
    raise AssertionError(f"{text!r} takes a keep, but none of its parts does")


def autotune(
    settings: Settings,
    allowed: float = 0.01,
    start: int = 32,
    most: int = 512,
    confidence: float = 0.95,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Race the methods and keeps of `settings` on its tasks; writes `autotune.json` to its folder.

    Args:
        settings: as for `vtc.eval.harness.run.run`; `limit` and `baselines` are set here.
        allowed: allowed loss, a fraction in [0, 1): 0.01 is one point.
        start: samples per task in the first round.
        most: samples per task in the last round.
        confidence: see `race`, in (0, 1).
        observer: receives every round's progress.

    Returns:
        What it writes: {"format": 1, "settings", "model", "allowed", "confidence", "full":
        {"score", "cost", "ms"}, "rounds": [{"limit", "measured", "verdicts"}], "latest", "frontier"
        (names, the cheapest first, the full model with them), "winner" (or null), "certain",
        "failed": {name: error}}.

    Raises:
        BadInput: an invalid setting, or a task whose score is not the mean of its samples' scores.
        RuntimeError: the full model failed.
    """
    if not 0.0 <= allowed < 1.0:
        raise BadInput("--loss", f"expected a fraction in [0, 1), got {allowed}")
    if not 0.0 < confidence < 1.0:
        raise BadInput("--confidence", f"expected a fraction in (0, 1), got {confidence}")
    if settings.limit is not None:
        raise BadInput("--limit", "rounds set it; give --start and --most")
    try:
        sizes = rounds(start, most)
    except ArgumentError as error:
        raise BadInput("--start", error.message) from None
    names = [n for n in candidates(settings.methods, settings.keeps) if n not in ("full", "blind")]
    runner = _Runner(settings, observer)
    found = race(names, runner, allowed, sizes, confidence)
    reference = runner.full
    shown = frontier([*found.latest.values(), reference] if reference else [])
    result = {
        "format": 1,
        "settings": runner.settings,
        "model": runner.model,
        "allowed": allowed,
        "confidence": confidence,
        "full": reference and {k: asdict(reference)[k] for k in ("score", "cost", "ms", "samples")},
        "rounds": [asdict(one) for one in found.rounds],
        "latest": {name: asdict(m) for name, m in found.latest.items()},
        "frontier": [m.name for m in shown],
        "winner": found.winner.name if found.winner else None,
        "certain": found.certain,
        "failed": runner.failed,
    }
    write(settings.out / "autotune.json", json.dumps(result, indent=1, ensure_ascii=False))
    return result


class _Runner:
    """A `Measure` on real tasks; records the full model's figures and failures."""

    def __init__(self, settings: Settings, observer: Observer | None) -> None:
        self.given, self.observer = settings, observer
        self.full: Measured | None = None
        self.failed: dict[str, str] = {}
        self.settings: Any = None
        self.model: Any = None

    def __call__(
        self, names: Sequence[str], limit: int, confidence: float
    ) -> tuple[list[Measured], bool]:
        chosen = replace(
            self.given, methods=("full", *names), keeps=(), limit=limit, baselines=False
        )
        results = run(chosen, self.observer)
        self.settings, self.model = results["settings"], results["model"]
        cells = {(c["label"], c["task"]): c for c in of_this_run(results)}
        tasks = list(dict.fromkeys(self.given.tasks))
        reference = {task: self._scores(cells["full", task]) for task in tasks}
        measured = []
        for name in ("full", *names):
            rows = [cells[name, task] for task in tasks]
            broken = next((c["error"] for c in rows if c["status"] != "done"), None)
            if broken is not None:
                self.failed[name] = broken
                continue
            pairs = [
                [reference[task][k] - mine for k, mine in self._scores(row).items()]
                for task, row in zip(tasks, rows, strict=True)
            ]
            loss, low, high = paired_interval(pairs, confidence)
            one = Measured(
                name=name,
                cost=_mean([c["flops"]["lm"] for c in rows]),
                score=_mean([c["score"] for c in rows]),
                loss=loss,
                low=low,
                high=high,
                samples=sum(c["samples"] for c in rows),
                ms=_mean([c["ms"]["lm"] + c["ms"]["selector"] for c in rows]),
            )
            if name == "full":
                self.full = replace(one, low=0.0, high=0.0)
            else:
                measured.append(one)
        return measured, any(cells["full", task]["samples"] >= limit for task in tasks)

    def _scores(self, cell: Mapping[str, Any]) -> dict[str, float]:
        """The score of each sample by its id."""
        if cell["status"] != "done":
            raise RuntimeError(f"{cell['task']}: the full model failed: {cell['error']}")
        logged = logged_samples(self.given.out, cell["key"])
        scores = {k: sample["score"] for k, sample in logged.items()}
        if cell["interval"] is None or not all(0.0 <= s <= 1.0 for s in scores.values()):
            raise BadInput(
                "--tasks",
                f"{cell['task']}: its {cell['metric']} is not a mean of fractions over samples, so "
                "losses cannot be paired",
            )
        if not cell["flops"] or cell["flops"]["lm"] is None:
            raise BadInput("--model", f"{cell['task']}: its FLOPs are unknown (see vtc.cost)")
        return scores


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


# ---- printing -----------------------------------------------------------------------------------
def table(result: Mapping[str, Any], width: int | None = None) -> Any:
    """The result as a table for the terminal: all candidates, the frontier, the winner.

    Args:
        result: what `autotune` returned.
        width: columns of the terminal; below `FULL_WIDTH` the table has fewer columns, to fit 80.
            `None` shows all.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    full, best = result["full"], result["winner"]
    unit, name = (1e12, "TFLOPs") if full["cost"] >= 1e12 else (1e9, "GFLOPs")
    narrow = width is not None and width < FULL_WIDTH
    drawn = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    drawn.add_column("\ncandidate", overflow="fold", max_width=22 if narrow else None)
    numbers = [f"LM,\n{name}", "prefill,\nms", "\nsamples", "accuracy,\n%", "loss, points\n"]
    numbers[-1] += f"[{100 * result['confidence']:g} % interval]"
    left_out = (1, 2) if narrow else ()
    for i, header in enumerate(numbers):
        if i not in left_out:
            drawn.add_column(header, justify="right", no_wrap=True)
    drawn.add_column("\nverdict", no_wrap=True)
    drawn.add_column("on the\nfrontier", justify="center", no_wrap=True)
    verdicts = {k: v for one in result["rounds"] for k, v in one["verdicts"].items()}
    rows = [{"name": "full", "loss": 0.0, "low": 0.0, "high": 0.0, **full}]
    rows += sorted(result["latest"].values(), key=lambda m: -m["cost"])
    for m in rows:
        loss = "–" if m["name"] == "full" else (
            f"{100 * m['loss']:.1f} [{100 * m['low']:.1f}, {100 * m['high']:.1f}]"
        )  # fmt: skip
        figures = [
            three_digits(m["cost"] / unit), f"{m['ms']:.1f}", str(m["samples"]),
            f"{100 * m['score']:.1f}", loss,
        ]  # fmt: skip
        drawn.add_row(
            named(m["name"], 22) if narrow else m["name"],
            *(figure for i, figure in enumerate(figures) if i not in left_out),
            verdicts.get(m["name"], "–"),
            "●" if m["name"] in result["frontier"] else "",
            style="bold green" if m["name"] == best else None,
        )
    allowed = f"{100 * result['allowed']:g} points"
    if best is None:
        left = "open" in result["rounds"][-1]["verdicts"].values()
        more = "; some are open: raise --most" if left else ""
        line = f"No candidate was measured to lose at most {allowed}{more}."
    else:
        saved = 1 - result["latest"][best]["cost"] / full["cost"]
        sure = (
            f"with {100 * result['confidence']:g} % confidence"
            if result["certain"]
            else "as measured, which is uncertain: the interval reaches further; raise --most"
        )
        line = f"Cheapest within {allowed}: {best}, {100 * saved:.0f} % fewer FLOPs, {sure}."
    failed = [Text(f"failed: {k}: {v}", style="red") for k, v in result["failed"].items()]
    return Group(drawn, Text(f"\n{line}", style="bold"), *failed)
