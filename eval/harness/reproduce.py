# SPDX-License-Identifier: Apache-2.0
"""`vtc reproduce`: rerun the published tables of a model and compare every row.

The tables are data, `published/*.json`, each with its paper, table and known conventions:

    {"format": 1, "id", "model",     a name in `MODELS`
     "paper", "arxiv", "table",      where it is printed; "arxiv" is null if unknown
     "kind",                         "re-run": the paper ran all methods itself; "cited": figures
                                     of others, which differ by points from re-runs
     "how",                          in which environment
     "tokens_mean",                  what its numbers of tokens count
     "mean_ratio_of",                which benchmarks "mean_ratio" is over
     "rows": [{"name", "method",     as printed; vtc's name, null if the row is not run
               "why",                then the reason
               "tokens", "settings", settings for `vtc.presets.find` if the row names them
               "scores": {benchmark: figure as printed}, "mean_ratio"}]}

A difference means something only if both sides measure the same. `BENCHMARKS` gives the task for
each benchmark, and `differs` if that task is known to ask differently.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vtc.core.errors import ArgumentError
from vtc.core.names import unknown
from vtc.core.spec import parse_method
from vtc.methods import Method, make
from vtc.presets import find

from .results import of_this_run

__all__ = [
    "BENCHMARKS",
    "MODELS",
    "Benchmark",
    "MissingError",
    "Plan",
    "Planned",
    "Table",
    "TableRow",
    "compare",
    "load_tables",
    "missing",
    "plan_reproduction",
    "require",
    "settings_of",
    "table_of",
]

FOLDER = Path(__file__).parent / "published"
KINDS = ("re-run", "cited")


@dataclass(frozen=True)
class Model:
    """A model with published tables.

    Attributes:
        checkpoint: hub id.
        target: its name in `vtc.presets.TARGETS`.
    """

    checkpoint: str
    target: str


MODELS: dict[str, Model] = {"llava-1.5-7b": Model("llava-hf/llava-1.5-7b-hf", "llava-1.5")}


@dataclass(frozen=True)
class Benchmark:
    """The task behind a column of the tables.

    Attributes:
        task: task of lmms-eval; `None` if there is none, and `differs` says why.
        metrics: metrics of the task; their sum is the figure.
        data: hub id of the dataset.
        scale: ratio of printed figures to lmms-eval's.
        differs: how the task is known to differ from what papers print, or "".
    """

    task: str | None
    metrics: tuple[str, ...] = ()
    data: str = ""
    scale: float = 100.0
    differs: str = ""


_LMMS = "lmms-lab-encoder/"
BENCHMARKS: dict[str, Benchmark] = {
    "GQA": Benchmark("gqa", ("exact_match",), f"{_LMMS}GQA"),
    "MMB": Benchmark(
        "mmbench_en_dev_static", ("gpt_eval_score",), f"{_LMMS}MMBench", 1.0,
        "answers are parsed by a pattern, the published ones possibly by a judge",
    ),
    "MME": Benchmark("mme", ("mme_perception_score", "mme_cognition_score"), f"{_LMMS}MME", 1.0),
    "MME-P": Benchmark("mme", ("mme_perception_score",), f"{_LMMS}MME", 1.0),
    # The tables do not say which of POPE's figures they print.
    "POPE": Benchmark("pope", ("pope_f1_score",), f"{_LMMS}POPE", 100.0, "F1 is assumed"),
    "SQA": Benchmark("scienceqa_img", ("exact_match",), f"{_LMMS}ScienceQA"),
    "TextVQA": Benchmark(
        "textvqa_val", ("exact_match",), f"{_LMMS}textvqa", 100.0,
        "prompts contain no OCR tokens; published runs differ in this",
    ),
    "SEED-I": Benchmark("seedbench", ("seed_image",), f"{_LMMS}SEED-Bench"),
    "MMMU": Benchmark("mmmu_val", ("mmmu_acc",), f"{_LMMS}MMMU"),
    "COCO17": Benchmark("coco2017_cap_val", ("coco_CIDEr",), f"{_LMMS}COCO-Caption2017"),
    "VQAv2": Benchmark(None, differs="its test split is scored by the benchmark's server only"),
}  # fmt: skip
"""Benchmarks by the column names of the tables."""


# ---- the tables ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class TableRow:
    """One printed row; see the module's docstring."""

    name: str
    method: str | None
    tokens: int
    scores: Mapping[str, float] = field(hash=False)
    mean_ratio: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    why: str = ""


@dataclass(frozen=True)
class Table:
    """One printed table; see the module's docstring."""

    id: str
    model: str
    paper: str
    arxiv: str | None
    table: str
    kind: str
    how: str
    tokens_mean: str
    mean_ratio_of: str | None
    rows: tuple[TableRow, ...]

    @property
    def source(self) -> str:
        """Paper, table and arXiv id in one line."""
        return f"{self.paper}, {self.table}" + (f", arXiv:{self.arxiv}" if self.arxiv else "")


def load_tables(model: str, folder: Path = FOLDER) -> list[Table]:
    """All tables of `model`, those of re-runs first.

    Raises:
        ValueError: no such model, or a malformed file (see the module's docstring); names the file
            and the field.
    """
    if model not in MODELS:
        raise ArgumentError("name", unknown(model, MODELS))
    tables = [_table(path) for path in sorted(folder.glob("*.json"))]
    seen: set[str] = set()
    for table in tables:
        if table.id in seen:
            raise ValueError(f"{folder}: two tables have the id {table.id!r}")
        seen.add(table.id)
    mine = [table for table in tables if table.model == model]
    return sorted(mine, key=lambda table: (KINDS.index(table.kind), table.id))


def _table(path: Path) -> Table:
    try:
        data = json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name}: not JSON: {error}") from error
    check = _Check(path.name)
    check(isinstance(data, dict), "expected an object")
    check(data.get("format") == 1, f"format: expected 1, got {data.get('format')!r}")
    texts = ("id", "model", "paper", "table", "kind", "how", "tokens_mean")
    names = {"format", "arxiv", "mean_ratio_of", "rows", *texts}
    check(set(data) == names, f"fields: expected {sorted(names)}, got {sorted(data)}")
    for name in texts:
        check(isinstance(data[name], str) and data[name], f"{name}: expected a text")
    for name in ("arxiv", "mean_ratio_of"):
        check(data[name] is None or isinstance(data[name], str), f"{name}: expected a text or null")
    check(data["model"] in MODELS, f"model: expected one of {', '.join(MODELS)}")
    check(data["kind"] in KINDS, f"kind: expected one of {', '.join(KINDS)}, got {data['kind']!r}")
    check(isinstance(data["rows"], list) and data["rows"], "rows: expected at least one")
    rows = tuple(_row(check, i, row) for i, row in enumerate(data["rows"]))
    keys = [(row.name, row.tokens) for row in rows]
    check(len(set(keys)) == len(keys), "rows: the same name and tokens twice")
    return Table(rows=rows, **{name: data[name] for name in names - {"format", "rows"}})


class _Check:
    def __init__(self, file: str) -> None:
        self.file = file

    def __call__(self, good: Any, message: str) -> None:
        if not good:
            raise ValueError(f"{self.file}: {message}")


def _row(check: _Check, number: int, row: Any) -> TableRow:
    where = f"rows[{number}]"
    check(isinstance(row, dict), f"{where}: expected an object")
    wanted = {"name", "method", "tokens", "scores", "mean_ratio"}
    allowed = {*wanted, "settings", "why"}
    check(wanted <= set(row) <= allowed, f"{where}: expected {sorted(wanted)}")
    check(isinstance(row["name"], str) and row["name"], f"{where}.name: expected a text")
    tokens, ratio = row["tokens"], row["mean_ratio"]
    check(type(tokens) is int and tokens >= 1, f"{where}.tokens: expected a whole number")
    check(ratio is None or _positive(ratio), f"{where}.mean_ratio: expected a number or null")
    why = row.get("why", "")
    check(isinstance(why, str), f"{where}.why: expected a text")
    check((row["method"] is None) == bool(why), f"{where}.why: goes with a method of null")
    if (method := row["method"]) is not None:
        try:
            make(method)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{check.file}: {where}.{error}") from None
    check(isinstance(row["scores"], dict) and row["scores"], f"{where}.scores: expected some")
    for name, score in row["scores"].items():
        known = f"expected one of {', '.join(BENCHMARKS)}"
        check(name in BENCHMARKS, f"{where}.scores: {known}, got {name!r}")
        check(_positive(score), f"{where}.scores.{name}: expected a number, got {score!r}")
    return TableRow(**row)


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


# ---- the plan -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Planned:
    """One method to run.

    Attributes:
        text: as in `vtc.eval.harness.run.Settings.methods`.
        method: the same as an object.
        tokens: the published target.
        convention: what `tokens` counts here; `None` for the full model.
        source: where the settings come from.
    """

    text: str
    method: Method = field(hash=False)
    tokens: int
    convention: str | None
    source: str


@dataclass(frozen=True)
class Plan:
    """What `vtc reproduce` runs.

    Attributes:
        name: name of the model in `MODELS`.
        checkpoint: hub id.
        tasks: tasks of lmms-eval.
        datasets: hub ids of their datasets.
        methods: each once, the full model first.
        left_out: (row or benchmark, why it is not run).
        tables: the tables to compare with.
    """

    name: str
    checkpoint: str
    tasks: tuple[str, ...]
    datasets: tuple[str, ...]
    methods: tuple[Planned, ...]
    left_out: tuple[tuple[str, str], ...]
    tables: tuple[Table, ...]


def plan_reproduction(name: str, folder: Path = FOLDER) -> Plan:
    """The tasks, methods and token targets of all published tables of a model.

    Raises:
        ValueError: no such model; lists the known ones.
    """
    tables = load_tables(name, folder)
    methods: dict[str, Planned] = {}
    left_out: dict[str, str] = {}
    used: dict[str, None] = {}
    for table in tables:
        for row in table.rows:
            label = f"{row.name} at {row.tokens} tokens"
            used |= dict.fromkeys(row.scores)
            planned, why = _planned(row, MODELS[name].target)
            if planned is None:
                left_out.setdefault(label, why)
            else:
                methods.setdefault(planned.text, planned)
    tasks: dict[str, str] = {}
    for column in used:
        benchmark = BENCHMARKS[column]
        if benchmark.task is None:
            left_out[column] = benchmark.differs
        else:
            tasks[benchmark.task] = benchmark.data
    return Plan(
        name=name,
        checkpoint=MODELS[name].checkpoint,
        tasks=tuple(tasks),
        datasets=tuple(dict.fromkeys(tasks.values())),
        methods=tuple(sorted(methods.values(), key=lambda m: m.text != "full")),
        left_out=tuple(left_out.items()),
        tables=tuple(tables),
    )


def _planned(row: TableRow, target: str) -> tuple[Planned | None, str]:
    """The method to run for a row, or why there is none."""
    if row.method is None:
        return None, row.why
    if row.method == "full":
        return Planned("full", make("full"), row.tokens, None, ""), ""
    try:
        preset = find(row.method, target, row.tokens, **row.settings)
    except ValueError as error:  # no preset of these tokens, or one that cannot be met
        return None, str(error)
    text, made = preset.text, preset.make()
    if parse_method(text) != made:
        raise AssertionError(f"{text!r} does not say {made}")
    return Planned(text, made, row.tokens, preset.convention, preset.source), ""


def settings_of(plan: Plan, out: Path, **options: Any) -> Any:
    """Settings of a plan's run, with further `options` (limit, device, ...)."""
    from .run import Settings

    texts = tuple(planned.text for planned in plan.methods)
    given = {"model": plan.checkpoint, **options}
    return Settings(out=out, methods=texts, tasks=plan.tasks, baselines=False, **given)


# ---- what it takes ------------------------------------------------------------------------------
class MissingError(RuntimeError):
    """Models or datasets of a plan are missing.

    Attributes:
        needs: one line for each.
    """

    def __init__(self, name: str, needs: Sequence[str]) -> None:
        lines = "".join(f"\n  {need}" for need in needs)
        super().__init__(
            f"vtc reproduce {name}: the hub does not answer, and these are not in its cache:{lines}"
        )
        self.needs = tuple(needs)


def missing(plan: Plan, checkpoint: str | None = None) -> list[str]:
    """What is missing from the local hub cache, with the commands that fetch it.

    Args:
        plan: from `plan_reproduction`.
        checkpoint: a folder or id instead of the plan's.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    model = plan.checkpoint if checkpoint is None else checkpoint
    things = [] if Path(model).expanduser().is_dir() else [("model", model)]
    things += [("dataset", name) for name in plan.datasets]
    needs = []
    for kind, name in things:
        try:
            snapshot_download(name, repo_type=kind, local_files_only=True)
        except (LocalEntryNotFoundError, HFValidationError):
            option = "" if kind == "model" else " --repo-type dataset"
            needs.append(f"{kind} {name}: hf download{option} {name}")
    return needs


def require(plan: Plan, checkpoint: str | None = None) -> None:
    """Check that the hub answers or its cache has everything needed.

    Raises:
        MissingError: otherwise, before any work is done.
    """
    from .quiet import hub_answers

    needs = missing(plan, checkpoint)
    if needs and not hub_answers():
        raise MissingError(plan.name, needs)


# ---- the comparison -----------------------------------------------------------------------------
def compare(results: Mapping[str, Any], tables: Sequence[Table]) -> list[dict[str, Any]]:
    """Every published figure with ours.

    Args:
        results: what `vtc.eval.harness.run.run` returned.
        tables: published tables.

    Returns:
        Rows {"table", "source", "kind", "name", "method", "tokens", "benchmark", "published",
        "ours", "difference", "samples", "note"}. "ours" and "difference" (ours minus published, in
        the published unit) are null if there is nothing to compare, and "note" says why; with a
        difference, a note says what limits the comparison.
    """
    cells: dict[tuple[str, str], Mapping[str, Any]] = {}
    for cell in of_this_run(results):
        if not cell["blind"]:
            cells[_identity(cell["method"]), cell["task"]] = cell
    return [row for table in tables for row in _compared(table, cells)]


def _identity(method: Mapping[str, Any]) -> str:
    """A method's settings as text, as JSON has turned the results' tuples into lists."""
    return json.dumps(method, sort_keys=True)


def _compared(
    table: Table, cells: Mapping[tuple[str, str], Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    target = MODELS[table.model].target
    for row in table.rows:
        planned, why = _planned(row, target)
        for column, published in row.scores.items():
            benchmark = BENCHMARKS[column]
            found: dict[str, Any] = {
                "table": table.id,
                "source": table.source,
                "kind": table.kind,
                "name": row.name,
                "method": planned.text if planned else None,
                "tokens": row.tokens,
                "benchmark": column,
                "published": published,
                "ours": None,
                "difference": None,
                "samples": None,
                "note": why or benchmark.differs,
            }
            if planned is not None and benchmark.task is not None:
                cell = cells.get((_identity(planned.method.to_dict()), benchmark.task))
                found |= _ours(cell, benchmark, published)
            yield found


def _ours(cell: Mapping[str, Any] | None, benchmark: Benchmark, published: float) -> dict[str, Any]:
    if cell is None:
        return {"note": "not run"}
    if cell["status"] != "done":
        return {"note": f"failed: {cell['error']}"}
    # lmms-eval's figures are named "metric,filter".
    figures = {key.partition(",")[0]: value for key, value in cell["lmms_eval"].items()}
    values = [figures.get(metric) for metric in benchmark.metrics]
    if not all(isinstance(value, (int, float)) for value in values):
        return {"note": f"lmms-eval gave no {' and '.join(benchmark.metrics)}"}
    ours = benchmark.scale * sum(float(value) for value in values if value is not None)
    return {"ours": ours, "difference": ours - published, "samples": cell["samples"]}


def table_of(rows: Sequence[Mapping[str, Any]]) -> Any:
    """The comparison as a rich table, without figures that we did not measure."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as Drawn

    drawn = Drawn(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for header in ("source", "row", "tokens", "benchmark", "published", "ours", "difference"):
        right = header not in ("source", "row", "benchmark")
        drawn.add_column(header, justify="right" if right else "left", overflow="fold")
    drawn.add_column("note", overflow="fold")
    for row in rows:
        if row["ours"] is None:
            continue
        digits = 0 if row["published"] > 200 else 1  # MME is a sum of points
        drawn.add_row(
            f"{row['table']} ({row['kind']})", row["name"], str(row["tokens"]), row["benchmark"],
            f"{row['published']:.{digits}f}", f"{row['ours']:.{digits}f}",
            f"{row['difference']:+.{digits}f}", row["note"],
        )  # fmt: skip
    return drawn
