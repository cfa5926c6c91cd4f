# SPDX-License-Identifier: Apache-2.0
"""`vtc eval`: every method, keep and task through lmms-eval, and what came out.

A *cell* is one (method, keep, task). Cells run one after the other in this process, through
`lmms_eval.evaluator.simple_evaluate`, on one model that is loaded once and patched anew for each
cell. A process for each cell would isolate them better, but importing lmms-eval takes ten seconds
and loading a 7 B model a minute, each time; a patch undoes itself bit for bit (tested), so nothing
is carried over from cell to cell.

In the output folder:

    results.json   what `run` returns: all cells of this run (below)
    results.csv    the same as one row a cell
    cells/KEY.json, KEY.jsonl    one finished cell and its samples
    data/          the generated suite, as parquet with its task files (for lmms-eval's
                   --include_path)
    log.txt        what lmms-eval and its libraries had to say

A cell that finished is not run again: KEY is a hash of everything that its result depends on
(model, method, task and data, limit, seed, dtype, device, versions, vtc's code). KEY.json is moved
into place last and at once, so a killed run leaves no half cell.

results.json:

    {"format": 1, "vtc": version, "settings": {...}, "model": {"id", "fingerprint", "lmms_eval"},
     "cells": [{
        "key", "task", "label",      label: "todre", "fastv:layer=3", "blind"
        "keep",                      the swept keep, null for methods without one
        "method",                    `Method.to_dict()`
        "blind",                     whether the images were grey
        "status", "error",           "done", or "failed" and why
        "metric", "score",           lmms-eval's figure for the task's first metric
        "interval",                  95 %, from the samples; null where the metric is no mean of
                                     theirs (MME)
        "samples",                   how many
        "by_type",                   {type: {"score", "interval", "samples"}} where rows have types
        "loyalty",                   share of answers equal to those of "full"; null without it
        "hard",                      {"samples", "score"} on the samples that "full" gets right and
                                     "downsample" at the same keep wrong (group A of VTC-Bench,
                                     ACL 2026); null without both
        "lmms_eval",                 all figures of lmms-eval for the task
        "tokens",                    {"in", "out", "per_layer", "equivalent"}: vision tokens of an
                                     image before compression, into the first decoder layer,
                                     processed by each, and the mean over the layers
        "flops",                     {"vision", "projector", "lm", "total"} of one sample's prefill,
                                     2 per multiply-add (see `vtc.cost`); null where not known
        "kv_bytes",                  keys and values of one sample after prefill
        "ms",                        {"vision", "selector", "lm"}: medians over prefills (batches);
                                     lm is the language model's prefill without the selector
        "seconds",                   of the whole cell
        "versions", "warnings"}]}
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import math
import os
import random
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import vtc
from vtc.spec import Keep, parse_method, takes_keep

from . import parallel, stats
from .quiet import hub_answers, offline, quiet

__all__ = ["BASELINES", "SUITE", "BadInput", "Observer", "Settings", "plan", "run", "write_suite"]

SUITE = ("vtc_scenes", "vtc_photo", "vtc_mosaic")
"""Tasks whose data is generated here."""

BASELINES = ("full", "blind", "random", "pool", "downsample")
"""What every method is to be compared with: all tokens, a grey image, and the simplest ways to get
to the same number of tokens."""

DTYPES = ("float32", "bfloat16", "float16")

_LMMS_CLASS = {
    "llava": "llava_hf",
    "llava_next": "llava_hf",
    "llava_onevision": "llava_hf",
    "qwen2_vl": "qwen2_vl",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "qwen3_vl_moe": "qwen3_vl",
    "qwen3_5": "qwen3_5",
    "internvl": "internvl_hf",
    "gemma3": "gemma3",
    "gemma4": "gemma4",
    "idefics2": "idefics2",
    "instructblip": "instructblip",
    "mistral3": "mistral3_vl",
    "llama4": "llama4_scout",
    "glm4v": "glm4v",
    "video_llava": "video_llava",
    "aria": "aria",
    "lfm2_vl": "lfm2_5_vl",
}
"""lmms-eval's class for a model type of transformers."""

_ONE_AT_A_TIME = ("llava_hf", "video_llava", "aria", "instructblip")
"""Classes of lmms-eval that assert a batch size of 1."""


class BadInput(ValueError):
    """Something given does not work; says which option, before any work is done."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(f"{option}: {message}")
        self.option, self.message = option, message


@dataclass(frozen=True)
class Settings:
    """What to run.

    Attributes:
        out: folder for everything that is written.
        model: a folder or an id from the hub; `None` is the model that comes with vtc.
        methods: as text (`vtc.spec`), and "blind".
        keeps: for each method that has a `keep` left open.
        tasks: of the suite here or of lmms-eval.
        limit: samples of each task; `None` for all.
        batch_size: for lmms-eval's class; many take 1 only.
        device: "cpu", "cuda", "cuda:1"; `None` for a GPU if there is one.
        dtype: one of `DTYPES`; `None` for float32 on the CPU, the checkpoint's own elsewhere.
        seed: of sampling methods, of the suite and of lmms-eval.
        baselines: add those of `BASELINES` that are missing.
        lmms_model: lmms-eval's class, where the model's type does not tell.
    """

    out: Path
    model: str | None = None
    methods: tuple[str, ...] = ("todre", "fastv")
    keeps: tuple[Keep, ...] = (0.25, 0.1)
    tasks: tuple[str, ...] = ("vtc_scenes",)
    limit: int | None = None
    batch_size: int = 1
    device: str | None = None
    dtype: str | None = None
    seed: int = 0
    baselines: bool = True
    lmms_model: str | None = None


@dataclass(frozen=True)
class Cell:
    """One (method, keep, task) to run."""

    label: str
    keep: Keep | None
    task: str
    method: vtc.Method
    blind: bool = False

    def key(self, context: Mapping[str, Any]) -> str:
        """Hash of all that the result depends on."""
        parts = {
            "method": self.method.to_dict(),
            "blind": self.blind,
            "task": self.task,
            **context,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


class Observer:
    """Told of a run's progress; the methods do nothing here."""

    def planned(self, total: int, cells: int, finished: int) -> None:
        """`total` samples are to be answered in all cells; `finished` cells are done already."""

    def stage(self, text: str) -> None:
        """What is going on now."""

    def advanced(self, samples: int) -> None:
        """So many more samples are answered."""

    def finished(self, cell: Mapping[str, Any]) -> None:
        """A cell is done or failed; a cell as in results.json."""


# ---- planning -----------------------------------------------------------------------------------
def plan(settings: Settings) -> list[Cell]:
    """The cells in the order in which they run: the baselines first, without repetition.

    Raises:
        BadInput: something in `settings` does not work, as far as that can be told without the
            model and the data.
    """
    if not settings.methods:
        raise BadInput("--methods", "expected at least one method, got none")
    if not settings.tasks:
        raise BadInput("--tasks", "expected at least one task, got none")
    if settings.limit is not None and settings.limit < 1:
        raise BadInput("--limit", f"expected at least 1, got {settings.limit}")
    if settings.batch_size < 1:
        raise BadInput("--batch-size", f"expected at least 1, got {settings.batch_size}")
    if settings.dtype is not None and settings.dtype not in DTYPES:
        raise BadInput("--dtype", f"expected one of {', '.join(DTYPES)}, got {settings.dtype!r}")
    if settings.seed < 0:
        raise BadInput("--seed", f"expected at least 0, got {settings.seed}")
    labels = [*(BASELINES if settings.baselines else ()), *settings.methods]
    labels = list(dict.fromkeys(label.replace(" ", "") for label in labels))
    variants: list[tuple[str, Keep | None, vtc.Method, bool]] = []
    for label in labels:
        try:
            if label == "blind":
                variants.append((label, None, vtc.make("full"), True))
            elif takes_keep(label):
                if not settings.keeps:
                    raise BadInput("--keep", f"expected a value for {label}, got none")
                for keep in dict.fromkeys(settings.keeps):
                    method = parse_method(label, keep, settings.seed)
                    variants.append((label, keep, method, False))
            else:
                variants.append((label, None, parse_method(label, None, settings.seed), False))
        except BadInput:
            raise
        except (ValueError, TypeError) as error:
            option = "--keep" if str(error).startswith("keep") else "--methods"
            raise BadInput(option, f"{label}: {error}") from error
    return [
        Cell(label, keep, task, method, blind)
        for task in dict.fromkeys(settings.tasks)
        for label, keep, method, blind in variants
    ]


def write_suite(name: str, folder: Path, limit: int | None = None, seed: int = 0) -> Path:
    """Generate a task of the suite into `folder`: its data (parquet) and its task files.

    The folder is then good for lmms-eval's `--include_path`. What is there already is kept.

    Returns:
        The parquet file.

    Raises:
        ValueError: unknown name.
    """
    if name not in SUITE:
        raise ValueError(f"name: expected one of {', '.join(SUITE)}, got {name!r}")
    data = folder / f"{name}.parquet"
    tasks = Path(__file__).parent / "tasks"
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("_vtc_template_yaml", "utils.py", f"{name}.yaml"):
        shutil.copyfile(tasks / file, folder / file)
    if not data.exists():
        from .suite import build_suite

        unfinished = folder / ".unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        options = {} if limit is None else {"limit": limit}
        os.replace(build_suite(name, unfinished, seed=seed, **options), data)
        shutil.rmtree(unfinished)
    return data


# ---- what a result depends on -------------------------------------------------------------------
def _fingerprint(folder: Path) -> str:
    """Hash of a model's folder: small files whole, of large ones size, head and tail."""
    digest = hashlib.sha256()
    edge = 1 << 20
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and ".cache" not in p.parts):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder).as_posix()}:{size};".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(edge))
            if size > 2 * edge:
                stream.seek(-edge, os.SEEK_END)
            digest.update(stream.read(edge))
    return digest.hexdigest()[:20]


def _own_sources() -> str:
    """Hash of vtc's own code: while a method is worked on, its version says nothing."""
    digest = hashlib.sha256()
    folder = Path(vtc.__file__).parent
    for file in sorted(folder.rglob("*.py")):
        digest.update(file.relative_to(folder).as_posix().encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:20]


def _versions() -> dict[str, str]:
    names = ("lmms-eval", "transformers", "torch")
    return {"vtc": vtc.__version__, **{n: metadata.version(n).partition("+")[0] for n in names}}


def _write(path: Path, text: str) -> None:
    """Write a file at once: readers see the old one or the new one. Of several processes the first
    writes."""
    if parallel.rank() != 0:
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, "utf-8")
    os.replace(temporary, path)


def _json(value: Any) -> Any:
    """`value` as strict JSON can hold it: `nan` becomes `null`, what is unknown its text."""
    if isinstance(value, Mapping):
        return {str(k): _json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if hasattr(value, "item"):
        return _json(value.item())
    return str(value)


# ---- the model and the tasks --------------------------------------------------------------------
@dataclass(frozen=True)
class _Source:
    """The model to be loaded."""

    id: str
    fingerprint: str
    builtin: str
    prompts: str
    device: str
    dtype: str | None

    @property
    def summary(self) -> dict[str, str]:
        return {"id": self.id, "fingerprint": self.fingerprint, "lmms_eval": self.builtin}


def _source(settings: Settings) -> _Source:
    """Find the model's configuration, and with it lmms-eval's class.

    Raises:
        BadInput: no such folder, or not in the hub or its cache; no class of lmms-eval known.
    """
    import torch
    from transformers import AutoConfig

    from .embedded_vlm import embedded_path

    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise BadInput("--device", f"expected cpu, cuda or cuda:0, got {device!r}") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device", f"got {device!r}, but PyTorch sees no GPU here")
    if device == "cuda" and parallel.world() > 1:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    embedded = settings.model is None
    model = str(embedded_path()) if settings.model is None else settings.model
    folder = Path(model).expanduser()
    local = folder.is_dir()
    if not local and (embedded or model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise BadInput("--model", f"no folder {model}")
    if local and not (folder / "config.json").is_file():
        raise BadInput("--model", f"the folder {model} has no config.json: not a saved model")
    try:
        config = AutoConfig.from_pretrained(folder if local else model)
    except (OSError, ValueError) as error:
        if local:
            raise BadInput("--model", f"{model}: {error}") from error
        raise BadInput(
            "--model",
            f"{model} is no folder here, nor in the hub's cache, and could not be fetched from the "
            f"hub. With a network, `hf download {model}` fetches it; or give a folder. "
            f"({str(error).splitlines()[0]})",
        ) from error
    builtin = settings.lmms_model or _LMMS_CLASS.get(config.model_type)
    if builtin is None:
        raise BadInput(
            "--lmms-model",
            f"no class of lmms-eval is known for the model type {config.model_type!r}; name one "
            f"(known are {', '.join(_LMMS_CLASS)})",
        )
    if settings.batch_size > 1 and builtin in _ONE_AT_A_TIME:
        raise BadInput(
            "--batch-size", f"lmms-eval's {builtin} takes 1 only, got {settings.batch_size}"
        )
    # A hub model's commit is in its configuration; a folder has none.
    commit = None if local else getattr(config, "_commit_hash", None)
    shipped = local and folder.resolve() == embedded_path().resolve()
    return _Source(
        id="embedded" if shipped else model,
        fingerprint=commit or (_fingerprint(folder) if local else model),
        builtin=builtin,
        prompts="vtc_embedded" if shipped else builtin,
        device=device,
        dtype=settings.dtype or ("float32" if kind == "cpu" else None),
    )


def _load(source: _Source, settings: Settings, simple: bool) -> Any:
    """lmms-eval's class on the model, unpatched.

    Raises:
        BadInput: it could not be loaded.
    """
    import torch
    from lmms_eval.models import get_model
    from vtc.integrations.lmms_eval import PREFIX
    from vtc.integrations.lmms_eval.models import accepted_arguments

    from .embedded_vlm import embedded_path

    try:
        cls = get_model(PREFIX + source.builtin, force_simple=simple)
    except ValueError as error:
        raise BadInput("--lmms-model", f"lmms-eval has no class {source.builtin!r}") from error
    path = str(embedded_path()) if source.id == "embedded" else source.id
    options: dict[str, Any] = {"pretrained": path, "batch_size": settings.batch_size}
    options["device"] = source.device
    takes_dtype = "dtype" in accepted_arguments(cls)
    if takes_dtype and source.dtype is not None:
        options["dtype"] = source.dtype
    try:
        model = cls(**options)
    except Exception as error:
        raise BadInput("--model", f"{path}: {type(error).__name__}: {error}") from error
    if source.dtype is not None and not takes_dtype:
        model.model.to(getattr(torch, source.dtype))
    model.model.eval()
    model.vtc_keep_model = True
    return model


class _Tasks:
    """The tasks of a run, their data at hand.

    Raises:
        BadInput: unknown task, or its data is missing.
    """

    def __init__(self, settings: Settings, source: _Source) -> None:
        from lmms_eval.tasks import TaskManager, get_task_dict

        self.data: dict[str, str] = {}
        folders = []
        for name in dict.fromkeys(settings.tasks):
            if name in SUITE:
                size = "all" if settings.limit is None else settings.limit
                folder = settings.out / "data" / f"{name}-{size}-{settings.seed}"
                try:
                    limit, seed = settings.limit, settings.seed
                    parquet = parallel.from_first(partial(write_suite, name, folder, limit, seed))
                except Exception as error:  # the photos' folder is not set, the disk is full, ...
                    raise BadInput("--tasks", f"{name}: {error}") from error
                self.data[name] = hashlib.sha256(parquet.read_bytes()).hexdigest()[:20]
                folders.append(str(folder))
        foreign = [name for name in settings.tasks if name not in SUITE]
        self.manager = TaskManager(
            include_path=folders,
            include_defaults=bool(foreign),  # lmms-eval has thousands of task files
            model_name=source.prompts,
        )
        self.samples: dict[str, int] = {}
        kinds = set()
        for name in dict.fromkeys(settings.tasks):
            if name not in self.manager.all_tasks:
                known = [*SUITE, *self.manager.all_tasks]
                close = difflib.get_close_matches(name, known, 3) or SUITE
                raise BadInput("--tasks", f"no task {name!r}; did you mean {', '.join(close)}?")
            try:
                loaded = get_task_dict([name], self.manager)
            except Exception as error:
                raise BadInput("--tasks", _missing_data(name, self.manager, error)) from error
            leaves = list(_leaves(loaded))
            sizes = [len(task.eval_docs) for task in leaves]
            limit = settings.limit
            self.samples[name] = sum(min(n, limit) if limit else n for n in sizes)
            kinds |= {task.OUTPUT_TYPE for task in leaves}
        self.generation_only = all(kind.startswith("generate") for kind in kinds)


def _leaves(tasks: Mapping[Any, Any]) -> Iterator[Any]:
    for value in tasks.values():
        if isinstance(value, Mapping):
            yield from _leaves(value)
        else:
            yield value[1] if isinstance(value, tuple) else value


def _missing_data(name: str, manager: Any, error: BaseException) -> str:
    """What to say when a task's data could not be loaded."""
    cause = getattr(error, "last_attempt", None)  # lmms-eval retries with tenacity
    if cause is not None and cause.exception() is not None:
        error = cause.exception()
    where = manager._get_config(name).get("dataset_path") if name in manager.all_subtasks else None
    what = f"its data {where!r}" if where else "its data"
    return (
        f"{name}: {what} could not be loaded, from the cache or the hub. With a network, "
        f"`hf download --repo-type dataset {where or 'NAME'}` fetches it; the tasks "
        f"{', '.join(SUITE)} need none. ({type(error).__name__}: {str(error).splitlines()[0]})"
    )


# ---- running ------------------------------------------------------------------------------------
def run(settings: Settings, observer: Observer | None = None) -> dict[str, Any]:
    """Run all cells that are not finished yet, and write the output folder (see the module).

    A cell that fails is marked so, and the others go on.

    Raises:
        BadInput: something given does not work; nothing was run then.
    """
    from .page import machine  # the page imports this module

    observer = observer or Observer()
    cells = plan(settings)
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
        (settings.out / "cells").mkdir(exist_ok=True)
    except OSError as error:
        raise BadInput("--out", f"{settings.out}: {error.strerror}") from error
    local = settings.model is None or Path(settings.model).expanduser().is_dir()
    all_local = local and all(task in SUITE for task in settings.tasks)
    observer.stage("looking at the model")
    number = parallel.rank()
    log = settings.out / ("log.txt" if number == 0 else f"log.{number}.txt")
    with quiet(log), offline(all_local or not hub_answers()):
        parallel.start(settings.device)
        _import_lmms_eval(observer)
        source = _source(settings)
        observer.stage("preparing the data")
        tasks = _Tasks(settings, source)
        versions = _versions()
        fixed = {
            "model": source.fingerprint,
            "lmms_eval_class": source.builtin,
            "limit": settings.limit,
            "seed": settings.seed,
            "dtype": source.dtype,
            "device": source.device.partition(":")[0],
            "versions": {k: v for k, v in versions.items() if k != "torch"},
            "sources": _own_sources(),
        }
        keys = [cell.key({**fixed, "data": tasks.data.get(cell.task)}) for cell in cells]
        # Asked of one process, as they must agree on what is to be done.
        rows: list[dict[str, Any] | None] = parallel.from_first(
            lambda: [_finished(settings.out, key) for key in keys]
        )
        todo = [i for i, row in enumerate(rows) if row is None]
        # `advanced` hears of this process's share only.
        shares = [math.ceil(n / parallel.world()) for n in tasks.samples.values()]
        share = dict(zip(tasks.samples, shares, strict=True))
        total = sum(share[cells[i].task] for i in todo)
        observer.planned(total, len(cells), len(cells) - len(todo))
        model = None
        if todo:
            observer.stage("loading the model")
            model = _load(source, settings, simple=not tasks.generation_only)
            model.vtc_progress = observer.advanced
        head = {
            "format": 1,
            "vtc": vtc.__version__,
            "settings": _json({**vars(settings), "model": source.id}),
            "model": source.summary,
            "machine": machine(source.device),
        }
        for i in todo:
            cell = cells[i]
            observer.stage(_title(cell))
            rows[i] = _run_cell(cell, keys[i], model, tasks, settings, versions)
            observer.finished(rows[i] or {})
            _write_results(settings.out, {**head, "cells": [r for r in rows if r is not None]})
    results = {**head, "cells": [r for r in rows if r is not None]}
    _write_results(settings.out, results)
    return results


def _import_lmms_eval(observer: Observer) -> None:
    if "lmms_eval.evaluator" not in sys.modules:
        observer.stage("importing lmms-eval")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import lmms_eval.evaluator  # noqa: F401
    except ImportError as error:
        raise BadInput(
            "vtc eval", f"needs `pip install vision-token-compression[eval]` ({error})"
        ) from error


def _title(cell: Cell) -> str:
    keep = "" if cell.keep is None else f" keep {cell.keep:g}"
    return f"{cell.task}: {cell.label}{keep}"


def _finished(out: Path, key: str) -> dict[str, Any] | None:
    """The cell as it was written when it finished, if it was."""
    file = out / "cells" / f"{key}.json"
    if not file.is_file() or not file.with_suffix(".jsonl").is_file():
        return None
    row: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return row


def _run_cell(
    cell: Cell,
    key: str,
    model: Any,
    tasks: _Tasks,
    settings: Settings,
    versions: Mapping[str, str],
) -> dict[str, Any]:
    from lmms_eval.evaluator import simple_evaluate

    row: dict[str, Any] = {
        "key": key,
        "task": cell.task,
        "label": cell.label,
        "keep": cell.keep,
        "method": _json(cell.method.to_dict()),
        "blind": cell.blind,
        "status": "failed",
        "error": None,
        "versions": dict(versions),
    }
    started = time.perf_counter()
    state = random.getstate()  # lmms-eval seeds the process's generators
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default", UserWarning)
            model.vtc_apply(cell.method, blind=cell.blind)
        row["warnings"] = sorted({str(w.message) for w in caught})
        found = simple_evaluate(
            model=model,
            tasks=[cell.task],
            task_manager=tasks.manager,
            limit=settings.limit,
            batch_size=settings.batch_size,
            bootstrap_iters=0,  # intervals are made here, from the samples
            log_samples=True,
            random_seed=settings.seed,
            numpy_random_seed=settings.seed,
            torch_random_seed=settings.seed,
            fewshot_random_seed=settings.seed,
            process_docs_parallel=1,
        )
        report = model.vtc_patch.report
        shared = [prefill for part in parallel.everyone(report.prefills) for prefill in part]
        if parallel.rank() != 0:  # all that lmms-eval found is with the first
            return {**row, "status": "done"}
        report.reset()
        for prefill in shared:
            report.add(prefill)
        samples = list(_samples(found, cell.task))
        row |= _scores(found, cell.task, samples)
        row |= _figures(report)
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"
        return row
    finally:
        random.setstate(state)
        model.vtc_apply(None)
        row["seconds"] = round(time.perf_counter() - started, 3)
    row["status"] = "done"
    base = settings.out / "cells"
    lines = "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in samples)
    _write(base / f"{key}.jsonl", lines)
    _write(base / f"{key}.json", json.dumps(row, indent=1))
    return row


def _first_metric(found: Mapping[str, Any], task: str) -> str:
    """The first metric of a task's configuration; of a group's, that of its first task."""
    configs = found["configs"]
    config = configs.get(task) or next(iter(configs.values()))
    return str(config["metric_list"][0]["metric"])


def _samples(found: Mapping[str, Any], task: str) -> Iterator[dict[str, Any]]:
    """What is kept of each sample: enough for loyalty, paired tests and scores by type."""
    metric = _first_metric(found, task)
    for name, logged in found["samples"].items():
        # Several processes hand over theirs one after the other.
        for sample in sorted(logged, key=lambda s: s["doc_id"]):
            doc = sample.get("doc", {})
            kinds = (doc.get(k) for k in ("type", "category", "question_type"))
            answer = sample["filtered_resps"]
            while isinstance(answer, (list, tuple)) and len(answer) == 1:
                answer = answer[0]
            yield {
                "id": f"{name}/{sample['doc_id']}",
                "type": next((k for k in kinds if isinstance(k, str)), None),
                "target": _json(sample["target"]),
                "answer": answer if isinstance(answer, str) else json.dumps(_json(answer)),
                "score": stats.sample_score(sample.get(metric)),
            }


def _scores(
    found: Mapping[str, Any], task: str, samples: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    metric = _first_metric(found, task)
    figures = found["results"].get(task, {})
    scores = [s["score"] for s in samples if s["score"] is not None]
    named = {k: v for k, v in figures.items() if k.split(",")[0] == metric}
    score = stats.sample_score(next(iter(named.values()), None))
    if score is None and scores:  # a group without an aggregate of its own
        score = sum(scores) / len(scores)
    # Only of a mean over samples do the samples tell the interval.
    is_mean = score is not None and scores and math.isclose(score, sum(scores) / len(scores))
    by_type: dict[str, Any] = {}
    for kind in sorted({s["type"] for s in samples if s["type"] is not None}):
        part = [s["score"] for s in samples if s["type"] == kind and s["score"] is not None]
        if part and is_mean:
            by_type[kind] = {
                "score": sum(part) / len(part),
                "interval": list(stats.interval(part)),
                "samples": len(part),
            }
    return {
        "metric": metric,
        "score": score,
        "interval": list(stats.interval(scores)) if is_mean else None,
        "samples": len(samples),
        "by_type": by_type,
        "lmms_eval": _json(figures),
    }


def _figures(report: Any) -> dict[str, Any]:
    """Tokens, FLOPs and times of a cell from its patch's report.

    Times are medians: the first prefills are slow for reasons that are not the method's.
    """
    if not report.prefills:
        return {"tokens": None, "flops": None, "kv_bytes": None, "ms": None}
    flops = dict(report.flops)
    flops["total"] = sum(flops.values())
    times = {
        name: statistics.median(getattr(prefill, f"{name}_ms") for prefill in report.prefills)
        for name in ("vision", "selector", "lm")
    }
    tokens = {
        "in": report.tokens_in,
        "out": report.tokens_out,
        "per_layer": report.tokens_per_layer,
        "equivalent": report.equivalent_tokens,
    }
    figures: dict[str, Any] = _json(
        {"tokens": tokens, "flops": flops, "kv_bytes": report.kv_bytes, "ms": times}
    )
    return figures


# ---- writing ------------------------------------------------------------------------------------
def _logged(out: Path, key: str) -> dict[str, dict[str, Any]]:
    """The samples of a finished cell by their id."""
    lines = (out / "cells" / f"{key}.jsonl").read_text("utf-8").splitlines()
    return {sample["id"]: sample for sample in map(json.loads, lines)}


def _compare(out: Path, cells: Sequence[dict[str, Any]]) -> None:
    """Add what a cell can only be told beside others: loyalty, and the score on hard samples."""
    for task in {cell["task"] for cell in cells}:
        done = [c for c in cells if c["task"] == task and c["status"] == "done"]
        samples = {c["key"]: _logged(out, c["key"]) for c in done}
        full = next((samples[c["key"]] for c in done if c["label"] == "full"), None)
        small = {c["keep"]: samples[c["key"]] for c in done if c["label"] == "downsample"}
        for cell in done:
            mine, smaller = samples[cell["key"]], small.get(cell["keep"])
            cell["loyalty"] = cell["hard"] = None
            if full is None:
                continue
            answers = ({k: s["answer"] for k, s in x.items()} for x in (mine, full))
            cell["loyalty"] = stats.agreement(*answers)
            if smaller is not None and cell["interval"] is not None:
                cell["hard"] = _hard(mine, full, smaller)


def _hard(
    mine: Mapping[str, Any], full: Mapping[str, Any], smaller: Mapping[str, Any]
) -> dict[str, Any]:
    """The score on samples that need the tokens: right with all, wrong with a smaller image."""
    needed = [k for k in mine if full[k]["score"] == 1 and smaller[k]["score"] == 0]
    scores = [mine[k]["score"] for k in needed]
    return {"samples": len(scores), "score": sum(scores) / len(scores) if scores else None}


_COLUMNS = {
    "task": ("task",),
    "label": ("label",),
    "keep": ("keep",),
    "status": ("status",),
    "metric": ("metric",),
    "score": ("score",),
    "low": ("interval", 0),
    "high": ("interval", 1),
    "samples": ("samples",),
    "loyalty": ("loyalty",),
    "hard_score": ("hard", "score"),
    "hard_samples": ("hard", "samples"),
    "tokens_in": ("tokens", "in"),
    "tokens_out": ("tokens", "out"),
    "equivalent_tokens": ("tokens", "equivalent"),
    "vision_flops": ("flops", "vision"),
    "projector_flops": ("flops", "projector"),
    "lm_flops": ("flops", "lm"),
    "kv_bytes": ("kv_bytes",),
    "vision_ms": ("ms", "vision"),
    "selector_ms": ("ms", "selector"),
    "lm_ms": ("ms", "lm"),
    "error": ("error",),
}


def _at(cell: Any, path: Sequence[Any]) -> Any:
    for step in path:
        try:
            cell = cell[step]
        except (KeyError, IndexError, TypeError):
            return None
    return cell


def _write_results(out: Path, results: dict[str, Any]) -> None:
    if parallel.rank() != 0:
        return
    _compare(out, results["cells"])
    _write(out / "results.json", json.dumps(_json(results), indent=1, ensure_ascii=False))
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(_COLUMNS)
    for cell in results["cells"]:
        writer.writerow([_at(cell, path) for path in _COLUMNS.values()])
    _write(out / "results.csv", table.getvalue())
