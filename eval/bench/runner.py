# SPDX-License-Identifier: Apache-2.0
"""Runs interleaved variants, and records the machine and versions."""

from __future__ import annotations

import gc
import json
import platform
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vtc

from ..harness.folder import check_out
from ..harness.machine import load_average, machine
from ..harness.plan import BadInput, Observer
from ..harness.results import write
from ..harness.scoring import as_json
from .model import build, config_of
from .rows import csv_of, row_of
from .settings import Settings, Variant, device_of, plan
from .short import longest
from .subject import Subject, clock_of

if TYPE_CHECKING:
    import torch
    from torch import nn


def run(settings: Settings, observer: Observer | None = None) -> dict[str, Any]:
    """Measure all rows, and write bench.json and bench.csv to `settings.out`, if given.

    Variants of one precision and batch size are interleaved. After each such block the files are
    rewritten and the observer receives the results; "complete" is false until all are there. A
    variant that fails, for example for lack of memory, is marked, and the others continue.

    Args:
        settings: what to measure.
        observer: receives the progress.

    Returns:
        The contents of bench.json.

    Raises:
        BadInput: an invalid setting; nothing was measured.
    """
    import torch

    observer = observer or Observer()
    wanted = plan(settings)
    device = device_of(settings.device)
    if settings.out is not None:
        check_out(settings.out)
    config, image = config_of(settings)
    before, threads = load_average(), torch.get_num_threads()
    rows: list[dict[str, Any]] = []
    results: dict[str, Any] = {"format": 1, "settings": _stated(settings, image)}
    turns = settings.warmup + settings.repeats + 1  # and one for memory
    cells = [(dtype, batch) for dtype in settings.dtypes for batch in settings.batches]
    # Each method may have its own `short`.
    observer.planned(turns * len(cells) * (1 + 2 * len(wanted)), len(cells), 0)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)

    def found() -> dict[str, Any]:
        load = {"before": before, "after": load_average()}
        complete = len(cells) == len({(row["dtype"], row["batch"]) for row in rows})
        where = {**_where(device), "load_average": load}
        given = {**results, "machine": where, "complete": complete, "rows": rows}
        made: dict[str, Any] = as_json(given)
        return made

    # Existing objects stay: exempt them from the collection before each run.
    gc.collect()
    gc.freeze()
    try:
        for dtype in settings.dtypes:
            observer.stage(f"creating the model in {dtype}")
            model = build(config, settings, getattr(torch, dtype), device)
            if not rows:
                checked = _check(model, wanted)
                results["model"] = _describe(config, model, settings)
                results["versions"] = _versions()
                results["warnings"] = checked
            for batch in settings.batches:
                observer.stage(f"{dtype}, batch {batch}")
                fresh = [Variant(v.label, v.keep, v.method) for v in wanted]
                made = _measure(model, image, batch, fresh, settings, observer)
                rows += made
                for row in made:
                    observer.finished(row)
                _save(settings, found())
                observer.measured({**found(), "rows": as_json(made)})
            del model
            gc.collect()
        return found()
    finally:
        gc.unfreeze()
        torch.set_num_threads(threads)


def _save(settings: Settings, found: Mapping[str, Any]) -> None:
    if settings.out is not None:
        settings.out.mkdir(parents=True, exist_ok=True)
        write(settings.out / "bench.json", json.dumps(found, indent=1, ensure_ascii=False))
        write(settings.out / "bench.csv", csv_of(found["rows"]))


def _check(model: nn.Module, wanted: Sequence[Variant]) -> list[str]:
    """Try every method on the model before timing; returns the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        for variant in wanted:
            assert variant.method is not None
            try:
                vtc.patch(model, variant.method).unpatch()
            except (ValueError, TypeError) as error:
                of_model = isinstance(error, vtc.UnsupportedModelError)
                option = "--config" if of_model else "--methods"
                raise BadInput(option, f"{variant.label}: {error}") from error
    return sorted({str(warning.message) for warning in caught})


def _measure(
    model: Any,
    image: tuple[int, int],
    batch: int,
    methods: list[Variant],
    settings: Settings,
    observer: Observer,
) -> list[dict[str, Any]]:
    """The rows of one precision and batch size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        subject = Subject(model, image, batch, settings)
    plain = Variant("unpatched")
    if not settings.unpatched:
        plain.error = "left out"
    try:
        for variant in (plain, *methods) if settings.unpatched else methods:
            _attempt(subject, variant, observer, counts=False)
        order = _in_turns(subject, plain, methods)
        for variant in order:
            if variant.label == "short":
                _attempt(subject, variant, observer, counts=False)
        turns = settings.warmup + settings.repeats + 1
        observer.advanced(turns * (1 + 2 * len(methods) - len(order)))
        for turn in range(1, settings.warmup + settings.repeats):
            for variant in order:
                _attempt(subject, variant, observer, counts=turn >= settings.warmup)
        for variant in order:
            if variant.error is None:
                with _noting(variant):
                    variant.peak = subject.peak(variant)
            observer.advanced(1)
    finally:
        subject.close()
    return [row_of(subject, variant, plain) for variant in order]


@contextmanager
def _noting(variant: Variant) -> Iterator[None]:
    """Record an error of `variant`, so that the others continue."""
    try:
        yield
    except Exception as error:
        variant.error = f"{type(error).__name__}: {error}"
        variant.runs = {}


def _attempt(subject: Subject, variant: Variant, observer: Observer, counts: bool) -> None:
    if variant.error is None:
        with _noting(variant):
            times = subject.once(variant)
            if counts:
                for name, value in times.items():
                    variant.runs.setdefault(name, []).append(value)
    observer.advanced(1)


def _in_turns(subject: Subject, plain: Variant, methods: list[Variant]) -> list[Variant]:
    """The order of a round: the plain model, then methods of equal lengths with their `short`."""
    short: dict[tuple[int, ...], tuple[Variant, list[Variant]]] = {}
    failed = []
    for method in methods:
        if method.error is not None:
            failed.append(method)
            continue
        # A batch has the length of its longest row.
        lengths = longest(method.seen)
        if lengths == subject.whole and plain.error is None:
            method.reference = plain
            short.setdefault(lengths, (plain, []))[1].append(method)
            continue
        made = Variant("short", method.keep, lengths=lengths)
        method.reference, group = short.setdefault(lengths, (made, []))
        group.append(method)
    order = [plain] if subject.settings.unpatched else []
    for reference, group in short.values():
        order += group if reference is plain else [*group, reference]
    return order + failed


def _stated(settings: Settings, image: tuple[int, int]) -> dict[str, Any]:
    stated = {**vars(settings), "image": image, "config": _name(settings)}
    del stated["out"]
    return stated


def _name(settings: Settings) -> str:
    """The configuration's name; of a folder only the last part, without the machine's path."""
    folder = Path(settings.config).expanduser()
    return folder.resolve().name if folder.is_dir() else settings.config


def _describe(config: Any, model: Any, settings: Settings) -> dict[str, Any]:
    text = config.get_text_config()
    return {
        "id": _name(settings),
        "type": config.model_type,
        "weights": "pretrained" if settings.pretrained else "random",
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "attention": text._attn_implementation,
    }


def _versions() -> dict[str, str]:
    import torch
    import transformers

    found = {module.__name__: str(module.__version__) for module in (vtc, torch, transformers)}
    return {**found, "python": platform.python_version()}


def _where(device: torch.device) -> dict[str, Any]:
    import torch

    found = machine(str(device))
    name = found["gpu"]
    return {
        "device": str(device),
        "clock": clock_of(device),
        "cpu": found["cpu"],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": found["cores"],
        "threads": found["threads"],
        "gpu": None if name is None else {"name": name, "cuda": torch.version.cuda},
        "system": found["system"],
    }
