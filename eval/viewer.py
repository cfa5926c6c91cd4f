# SPDX-License-Identifier: Apache-2.0
"""Some samples of a run with their pictures, and which tokens each cell kept of them.

`vtc eval` logs answers and scores only. This module gets the questions and pictures back from the
tasks, and puts the cells' methods on the model once more, through the same class of lmms-eval, to
record what they keep. What it found is written to `samples.json` in the run's folder, so that it is
done once:

    {"format": 1, "signature": {...},         what it depends on; another one starts anew
     "samples": {ID: {"question", "image",    a JPEG in base64, what the vision tower saw
                      "size", "grid",         [width, height]; [rows, columns] of its tokens
                      "note"}},               why there is no picture or grid
     "kept": {KEY: {ID: {"answer", "grid",    of the second pass
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

from vtc.methods.base import Compose, Method
from vtc.pictures import as_rgb
from vtc.views import View

from . import run as runner
from .loading import Tasks, find_source, leaves, load
from .quiet import hub_answers, offline, quiet
from .results import write

__all__ = ["bits", "collect", "settings_of"]

_FORMAT = 1
_LONGEST_SIDE = 448
_QUALITY = 80


def settings_of(out: Path, results: Mapping[str, Any]) -> runner.Settings:
    """The settings of a run, from its results.json; `out` is where its folder is now."""
    saved = {f.name: results["settings"][f.name] for f in fields(runner.Settings)}
    lists = {name: tuple(saved[name]) for name in ("methods", "keeps", "tasks")}
    model = None if saved["model"] == "embedded" else saved["model"]
    return runner.Settings(**{**saved, **lists, "out": out, "model": model})


def bits(kept: Sequence[int], size: int) -> str:
    """Which of `size` tokens are in `kept`, as the module's head says.

    Raises:
        ValueError: a number that no token has.
    """
    chosen = set(kept)
    if chosen and not (min(chosen) >= 0 and max(chosen) < size):
        raise ValueError(f"kept: expected numbers below {size}, got {min(chosen)} to {max(chosen)}")
    padded = ["1" if i in chosen else "0" for i in range(-(-size // 4) * 4)]
    return "".join(f"{int(''.join(padded[i : i + 4]), 2):x}" for i in range(0, len(padded), 4))


def collect(
    out: Path, results: Mapping[str, Any], per_task: int = 8, trace: bool = True
) -> dict[str, Any]:
    """The first `per_task` samples of each task of a run, as in samples.json.

    What cannot be had is left out, and "problems" says why: a page without pictures is better than
    none.

    Args:
        out: the run's folder.
        results: its results.json.
        per_task: number of samples.
        trace: put the methods on the model where samples.json does not have them yet. Without it
            only what is there is read.
    """
    signature = {
        "model": results["model"]["fingerprint"],
        **{name: results["settings"][name] for name in ("tasks", "limit", "seed", "dtype")},
        "per_task": per_task,
    }
    found = _read(out, signature)
    problems: list[str] = []
    done = [c for c in results["cells"] if c["status"] == "done"]
    todo = [c for c in done if not c["blind"] and c["key"] not in found["kept"]]
    if trace and todo:
        try:
            _fill(out, results, found, todo, per_task, problems)
        except runner.BadInput as error:
            problems.append(str(error))
        except Exception as error:  # other people's code: the data, the model, the GPU's memory
            problems.append(f"{type(error).__name__}: {error}")
    return {**found, "problems": problems}


def _read(out: Path, signature: Mapping[str, Any]) -> dict[str, Any]:
    empty = {"format": _FORMAT, "signature": dict(signature), "samples": {}, "kept": {}}
    file = out / "samples.json"
    if not file.is_file():
        return empty
    found: dict[str, Any] = json.loads(file.read_text("utf-8"))
    same = found.get("format") == _FORMAT and found.get("signature") == empty["signature"]
    return found if same else empty


def _fill(
    out: Path,
    results: Mapping[str, Any],
    found: dict[str, Any],
    todo: Sequence[Mapping[str, Any]],
    per_task: int,
    problems: list[str],
) -> None:
    """Run the cells `todo` on the samples, and write what was found after each."""
    # One sample at a time, so that what is recorded can be told apart.
    settings = replace(settings_of(out, results), batch_size=1)
    local = settings.model is None or Path(settings.model).expanduser().is_dir()
    own = local and all(task in runner.SUITE for task in settings.tasks)
    state = random.getstate()  # lmms-eval seeds the process's generators
    with quiet(out / "log.txt"), offline(own or not hub_answers()):
        source = find_source(settings)
        if source.fingerprint != results["model"]["fingerprint"]:
            raise runner.BadInput("--model", "the model is not the one of this run any more")
        tasks = Tasks(settings, source)
        model = load(source, settings, simple=not tasks.generation_only)
        try:
            requests = _requests(model, tasks, settings, per_task)
            _plain_pass(model, requests, found)
            cells = {(c.task, c.label, c.keep): c for c in runner.plan(settings)}
            for row in todo:
                cell = cells[row["task"], row["label"], row["keep"]]
                mine = [r for r in requests if r.task == cell.task]
                try:
                    found["kept"][row["key"]] = _kept(model, cell.method, mine, found["samples"])
                except Exception as error:  # this method fails here; the others may not
                    problems.append(f"{cell.label}: {type(error).__name__}: {error}")
                write(out / "samples.json", json.dumps(found, ensure_ascii=False))
        finally:
            model.vtc_apply(None)
            random.setstate(state)


class _Request:
    """One sample, ready to be asked."""

    def __init__(self, task: str, name: str, instance: Any, question: str, images: list) -> None:
        self.task, self.instance, self.question, self.images = task, instance, question, images
        self.seen: Any = None
        self.id = f"{name}/{instance.doc_id}"

    @property
    def obstacle(self) -> str | None:
        """Why what is kept of this sample cannot be drawn."""
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


def _requests(model: Any, tasks: Any, settings: runner.Settings, per_task: int) -> list[_Request]:
    """The first samples of each task, as `simple_evaluate` would ask them."""
    from lmms_eval.tasks import get_task_dict

    requests = []
    limit = min(per_task, settings.limit or per_task)
    for name in dict.fromkeys(settings.tasks):
        loaded = get_task_dict([name], tasks.manager, "simple" if model.is_simple else "chat")
        parts = list(leaves(loaded))
        share = -(-limit // len(parts))
        for task in parts:
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=settings.seed)
            leaf = task.config.task
            model.task_dict[leaf] = task.dataset
            task.build_all_requests(limit=share, rank=0, world_size=1)
            seen = set()
            for instance in task.instances:
                if instance.doc_id in seen:  # one of several choices
                    continue
                seen.add(instance.doc_id)
                doc = task.eval_docs[instance.doc_id]
                question = task.doc_to_text(doc)
                images = list(task.doc_to_visual(doc) or ())
                requests.append(_Request(name, leaf, instance, str(question), images))
    return requests


def _plain_pass(model: Any, requests: Sequence[_Request], found: dict[str, Any]) -> None:
    """Note each sample's picture and grid, with all tokens kept."""
    from vtc.trace import _Record, _Watch

    for request in requests:
        sample: dict[str, Any] = {"question": request.question, "note": request.obstacle}
        sample |= {"image": None, "size": None, "grid": None}
        picture = request.images[0] if request.images else None
        if sample["note"] is None:
            record = _Record()
            model.vtc_apply(Compose((_Watch(record),)))
            with _pixels(model) as seen:
                request.ask(model)
            try:
                request.seen = seen, record
                view = _view(model, request, record)
                sample["grid"], picture = list(view.grid), view.image
            except ValueError as error:
                sample["note"] = f"not drawn: {error}"
        if isinstance(picture, Image.Image):
            sample["image"], sample["size"] = _jpeg(picture)
        found["samples"][request.id] = sample


def _kept(
    model: Any, method: Method, requests: Sequence[_Request], samples: Mapping[str, Any]
) -> dict[str, Any]:
    """What `method` keeps of each sample that can be drawn."""
    from vtc.trace import _Record, _recording, _Watch

    kept = {}
    for request in requests:
        grid = samples[request.id]["grid"]
        if grid is None:
            continue
        record = _Record()
        # What acts before there are tokens stands before the watcher.
        early = [m for m in method.parts if {"encoder", "pixels"} & set(m.stages)]
        late = [_recording(m, record) for m in method.parts if m not in early]
        model.vtc_apply(Compose((*early, _Watch(record), *late)))
        answer = request.ask(model)
        size = grid[0] * grid[1]
        left = _view(model, request, record).kept
        stages = {stage: bits(cells, size) for stage, cells in left.items()}
        kept[request.id] = {"answer": answer, "grid": grid, "stages": stages}
    return kept


class _pixels:
    """Catches the pixels that the model is given while it lasts."""

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
    from vtc.trace import views

    inputs, every = request.seen
    names = ("processor", "_processor", "_image_processor")
    found = (getattr(model, name, None) for name in names)
    processor = next((p for p in found if hasattr(p, "image_processor")), None)
    if processor is None:
        inputs = {}
    return views(record, every, inputs, model.model, processor, as_rgb(request.images[0]))[-1]


def _jpeg(picture: Image.Image) -> tuple[str, list[int]]:
    """(base64, [width, height]) of a copy that is not larger than a page needs."""
    small = as_rgb(picture).copy()
    small.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii"), list(small.size)
