# SPDX-License-Identifier: Apache-2.0
"""Samples of a run with their pictures and the tokens that each cell kept.

`vtc eval` logs only answers and scores. This module gets the questions and pictures from the
tasks, and runs the cells' methods again, with the same class of lmms-eval, to
record what they keep. It writes the findings to `samples.json` in the run's folder, so that this
happens once:

    {"format": 2,
     "samples": {GROUP:                       of comparable cells: `group_of`
        {ID: {"question", "image",            a JPEG in base64, what the vision tower saw
              "size", "grid",                 [width, height]; [rows, columns] of its tokens
              "note"}}},                      why there is no picture or grid
     "kept": {KEY: {ID: {"answer", "grid",    from the second pass
                         "stages"}}}}         {"into the language model": bits, ...}

Bits are hexadecimal: row-major, the first token is the highest bit of the first digit.
"""

from __future__ import annotations

import base64
import copy
import io
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from PIL import Image

from vtc.core import Method, make
from vtc.core.errors import ArgumentError
from vtc.core.spec import parse_method
from vtc.viz.pictures import as_rgb
from vtc.viz.views import View

from ..harness import run as runner
from ..harness.folder import REMEMBERED
from ..harness.identity import FileHashes
from ..harness.loading import Tasks, find_source, leaves, load
from ..harness.plan import bring_in
from ..harness.quiet import hub_answers, offline, quiet
from ..harness.results import group_of, write
from ..tasks import OWN_TASKS

__all__ = ["bits", "choose", "collect", "settings_of"]

_FORMAT = 2
_LONGEST_SIDE = 448
_QUALITY = 80


def settings_of(out: Path, results: Mapping[str, Any]) -> runner.Settings:
    """The settings of a run from its results.json; `out` is its current folder."""
    given = results["settings"]
    saved = {f.name: given[f.name] for f in fields(runner.Settings) if f.name in given}
    lists = ("methods", "keeps", "tasks", "include_paths", "imports")
    tuples = {name: tuple(saved[name]) for name in lists if name in saved}
    model = None if saved["model"] == "embedded" else saved["model"]
    return runner.Settings(**{**saved, **tuples, "out": out, "model": model})


def _settings_of_group(
    out: Path, results: Mapping[str, Any], cell: Mapping[str, Any]
) -> runner.Settings:
    """The settings of a cell's group, with a batch size of 1."""
    setup = cell["setup"]
    return replace(
        settings_of(out, results),
        model=None if setup["id"] == "embedded" else setup["id"],
        tasks=(cell["task"],),
        limit=setup["limit"],
        seed=setup["seed"],
        dtype=setup["dtype"],
        device=setup["device"],
        lmms_model=setup["lmms_eval"],
        model_args=setup["model_args"],
        batch_size=1,  # so that records belong to single samples
    )


def choose(
    cells: Sequence[Mapping[str, Any]], logs: Mapping[str, Mapping[str, Any]], count: int
) -> dict[str, bool]:
    """The most informative samples in order, and whether the cells differ on them.

    Types of question alternate, each starting with the samples whose right and wrong answers are
    most evenly spread over the cells (or with the most different answers, if not scored).

    Args:
        cells: cells of one group.
        logs: their samples.
        count: maximum number of samples.
    """
    mine = [logs[c["key"]] for c in cells if c["key"] in logs and not c["blind"]]
    ids = list(dict.fromkeys(name for log in mine for name in log))
    spread: dict[str, float] = {}
    kinds: dict[Any, list[tuple[float, int, str]]] = {}
    for place, name in enumerate(ids):
        said = [log[name] for log in mine if name in log]
        scores = [s["score"] for s in said if s["score"] is not None]
        if scores:
            mean = sum(scores) / len(scores)
            spread[name] = sum((x - mean) ** 2 for x in scores) / len(scores)
        else:
            spread[name] = float(len({s["answer"] for s in said}) - 1)
        kinds.setdefault(said[0]["type"], []).append((-spread[name], place, name))
    queues = [sorted(kind) for kind in kinds.values()]
    chosen: set[str] = set()
    for turn in range(max(map(len, queues), default=0)):
        for queue in queues:
            if turn < len(queue) and len(chosen) < count:
                chosen.add(queue[turn][2])
    return {name: spread[name] > 0 for name in ids if name in chosen}


def bits(kept: Sequence[int], size: int) -> str:
    """Which of `size` tokens are in `kept`, as hexadecimal bits; see the module's docstring.

    Raises:
        ArgumentError: an index out of range.
    """
    chosen = set(kept)
    if chosen and not (min(chosen) >= 0 and max(chosen) < size):
        raise ArgumentError(
            "kept", f"expected numbers below {size}, got {min(chosen)} to {max(chosen)}"
        )
    padded = ["1" if i in chosen else "0" for i in range(-(-size // 4) * 4)]
    return "".join(f"{int(''.join(padded[i : i + 4]), 2):x}" for i in range(0, len(padded), 4))


def collect(
    out: Path,
    results: Mapping[str, Any],
    wanted: Mapping[str, Sequence[str]],
    trace: bool = True,
) -> dict[str, Any]:
    """Samples of a run, as in samples.json.

    Whatever is unavailable is left out, and "problems" says why: a page without pictures is better
    than none.

    Args:
        out: the run's folder.
        results: its results.json.
        wanted: for each group of cells, ids of samples.
        trace: run methods that samples.json does not have yet. Otherwise only the file is read.
    """
    found = _read(out)
    problems: list[str] = []
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for cell in results["cells"]:
        if cell["status"] == "done" and not cell["blind"] and cell.get("setup"):
            groups.setdefault(group_of(cell), []).append(cell)
    for group, cells in groups.items() if trace else ():
        ids = wanted.get(group, ())
        kept = found["kept"]
        todo = [
            c
            for c in cells
            if any(i not in kept.get(c["key"], {}) for i in _drawn(found, group, ids))
        ]
        if not todo:
            continue
        try:
            _fill(out, results, found, todo, group, ids, problems)
        except runner.BadInput as error:
            problems.append(str(error))
        except Exception as error:  # other people's code: the data, the model, the GPU's memory
            problems.append(f"{type(error).__name__}: {error}")
    return {**found, "problems": list(dict.fromkeys(problems))}


def _drawn(found: Mapping[str, Any], group: str, ids: Sequence[str]) -> list[str]:
    """Samples whose tokens can be drawn, as far as known."""
    known = found["samples"].get(group, {})
    return [name for name in ids if known.get(name, {}).get("note") is None]


def _read(out: Path) -> dict[str, Any]:
    empty: dict[str, Any] = {"format": _FORMAT, "samples": {}, "kept": {}}
    file = out / "samples.json"
    if not file.is_file():
        return empty
    found: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return found if found.get("format") == _FORMAT else empty


def _fill(
    out: Path,
    results: Mapping[str, Any],
    found: dict[str, Any],
    todo: Sequence[Mapping[str, Any]],
    group: str,
    ids: Sequence[str],
    problems: list[str],
) -> None:
    """Run the cells `todo` of a group on the samples, and write the findings after each."""
    settings = _settings_of_group(out, results, todo[0])
    bring_in(settings.imports)
    setup, task = todo[0]["setup"], todo[0]["task"]
    local = settings.model is None or Path(settings.model).expanduser().is_dir()
    own = local and task in OWN_TASKS
    hashes = FileHashes(out / REMEMBERED)
    state = random.getstate()  # lmms-eval seeds the process's generators
    with quiet(out / "log.txt"), offline(own or not hub_answers()):
        source = find_source(settings, hashes)
        if source.fingerprint != setup["fingerprint"]:
            raise runner.BadInput("--model", "the model has changed since this run")
        tasks = Tasks(settings, source, hashes)
        if tasks.data[task] != setup["data"]:
            raise runner.BadInput("--tasks", f"{task} has changed since this run")
        model = load(source, settings, simple=not setup["chat"])
        try:
            samples = found["samples"].setdefault(group, {})
            requests = _requests(model, tasks, settings, ids)
            _plain_pass(model, [r for r in requests if r.id not in samples], samples)
            for row in todo:
                kept = found["kept"].setdefault(row["key"], {})
                mine = [r for r in requests if r.id not in kept]
                try:
                    method = parse_method(row["label"], row["keep"], setup["seed"])
                    kept |= _kept(model, method, mine, samples)
                except Exception as error:  # this method fails here; the others may not
                    problems.append(f"{row['label']}: {type(error).__name__}: {error}")
                write(out / "samples.json", json.dumps(found, ensure_ascii=False))
        finally:
            model.vtc_apply(None)
            random.setstate(state)


class _Request:
    """One sample to ask."""

    def __init__(self, name: str, instance: Any, question: str, images: list) -> None:
        self.instance, self.question, self.images = instance, question, images
        self.seen: Any = None
        self.id = f"{name}/{instance.doc_id}"

    @property
    def obstacle(self) -> str | None:
        """Why the kept tokens of this sample cannot be drawn, or `None`."""
        if self.instance.request_type != "generate_until":
            return f"not drawn for requests of the kind {self.instance.request_type}"
        if len(self.images) != 1 or not isinstance(self.images[0], Image.Image):
            return "not drawn: the sample is not a single image"
        return None

    def ask(self, model: Any) -> str:
        """The model's answer."""
        # lmms-eval's classes take entries out of the arguments, so they get copies.
        arguments = (copy.deepcopy(a) if isinstance(a, dict) else a for a in self.instance.args)
        fresh = copy.copy(self.instance)
        fresh.arguments = tuple(arguments)
        answer = model.generate_until([fresh])[0]
        return str(getattr(answer, "text", answer))


def _requests(
    model: Any, tasks: Any, settings: runner.Settings, ids: Sequence[str]
) -> list[_Request]:
    """The samples with these ids, as `simple_evaluate` asks them."""
    from lmms_eval.tasks import get_task_dict

    requests = []
    for name in dict.fromkeys(settings.tasks):
        loaded = get_task_dict([name], tasks.manager, "simple" if model.is_simple else "chat")
        for task in leaves(loaded):
            leaf = task.config.task
            numbers = {int(i.rpartition("/")[2]) for i in ids if i.rpartition("/")[0] == leaf}
            if not numbers:
                continue
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=settings.seed)
            model.task_dict[leaf] = task.dataset
            task.build_all_requests(limit=max(numbers) + 1, rank=0, world_size=1)
            for instance in task.instances:
                if instance.doc_id not in numbers:  # not wanted, or one of several choices
                    continue
                numbers.remove(instance.doc_id)
                doc = task.eval_docs[instance.doc_id]
                question = task.doc_to_text(doc)
                images = list(task.doc_to_visual(doc) or ())
                requests.append(_Request(leaf, instance, str(question), images))
    return requests


def _plain_pass(model: Any, requests: Sequence[_Request], samples: dict[str, Any]) -> None:
    """Record each sample's picture and grid, with all tokens kept."""
    from vtc.viz.record import TokenRecord

    for request in requests:
        sample: dict[str, Any] = {"question": request.question, "note": request.obstacle}
        sample |= {"image": None, "size": None, "grid": None}
        picture = request.images[0] if request.images else None
        if sample["note"] is None:
            record = TokenRecord()
            model.vtc_apply(make("full"))
            with _pixels(model) as seen, model.vtc_patch.listen(record.hear):
                request.ask(model)
            try:
                request.seen = seen, record
                view = _view(model, request, record)
                sample["grid"], picture = list(view.grid), view.image
            except ValueError as error:
                sample["note"] = f"not drawn: {error}"
        if isinstance(picture, Image.Image):
            sample["image"], sample["size"] = _jpeg(picture)
        samples[request.id] = sample


def _kept(
    model: Any, method: Method, requests: Sequence[_Request], samples: Mapping[str, Any]
) -> dict[str, Any]:
    """What `method` keeps of each sample that can be drawn."""
    from vtc.viz.record import TokenRecord

    kept = {}
    for request in requests:
        grid = samples[request.id]["grid"]
        if grid is None:
            continue
        record = TokenRecord()
        model.vtc_apply(method)
        with model.vtc_patch.listen(record.hear):
            answer = request.ask(model)
        size = grid[0] * grid[1]
        left = _view(model, request, record).kept
        stages = {stage: bits(cells, size) for stage, cells in left.items()}
        kept[request.id] = {"answer": answer, "grid": grid, "stages": stages}
    return kept


class _pixels:
    """Captures the pixels that the model receives within the block."""

    def __init__(self, model: Any) -> None:
        self.model = model.model
        self.inputs: dict[str, Any] = {}

    def __enter__(self) -> dict[str, Any]:
        def note(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
            if kwargs.get("pixel_values") is not None:
                self.inputs.setdefault("pixel_values", kwargs["pixel_values"])

        self.hook = self.model.register_forward_pre_hook(note, with_kwargs=True)
        return self.inputs

    def __exit__(self, *_: object) -> None:
        self.hook.remove()


def _view(model: Any, request: _Request, record: Any) -> View:
    """What the vision tower saw of a request's picture: of a tiled one the thumbnail, if any.

    Args:
        record: of a run; the plain one is in `request.seen`.

    Raises:
        ValueError: the tokens have no places in the picture.
    """
    from vtc.viz.trace import views

    inputs, every = request.seen
    names = ("processor", "_processor", "_image_processor")
    found = (getattr(model, name, None) for name in names)
    processor = next((p for p in found if hasattr(p, "image_processor")), None)
    if processor is None:
        inputs = {}
    return views(record, every, inputs, model.model, processor, as_rgb(request.images[0]))[-1]


def _jpeg(picture: Image.Image) -> tuple[str, list[int]]:
    """(base64, [width, height]) of a copy no larger than a page needs."""
    small = as_rgb(picture).copy()
    small.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii"), list(small.size)
