# SPDX-License-Identifier: Apache-2.0
"""The settings of a `vtc eval` run, and its cells."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import vtc
from vtc.core.errors import ArgumentError, message_of
from vtc.core.plugins import import_modules
from vtc.core.spec import (
    Keep,
    compact,
    keep_is_at_fault,
    parse_method,
    split_list,
    takes_keep,
)

__all__ = [
    "BASELINES",
    "DTYPES",
    "QUANTIZATIONS",
    "BadInput",
    "Cell",
    "Observer",
    "Settings",
    "bring_in",
    "check_arguments",
    "of_method",
    "parse_arguments",
    "parse_limit",
    "plan",
    "with_task_files",
]

BASELINES = ("full", "blind", "random", "pool", "downsample")
"""What to compare every method with: all tokens, a grey image, and the simplest ways to the
same number of tokens."""

DTYPES = ("float32", "bfloat16", "float16")

QUANTIZATIONS = ("4bit", "8bit")
"""Quantization of bitsandbytes, for `--model-args quantization=...`."""

_OPTIONS = {"pretrained": "--model", "batch_size": "--batch-size", "device": "--device"}
_OPTIONS |= {"dtype": "--dtype"} | dict.fromkeys(("method", "keep", "settings"), "--methods")
_OPTIONS |= {"blind": "--methods", "report": "--out"}
"""Arguments that have their own option instead of `--model-args`."""


class BadInput(ValueError):
    """An invalid option, reported before any work is done.

    Attributes:
        option: the option at fault.
        message: what is wrong with it.
    """

    def __init__(self, option: str, message: str) -> None:
        # Both go to `args`, so that the error survives pickling between processes.
        super().__init__(option, message)
        self.option, self.message = option, message

    def __str__(self) -> str:
        return f"{self.option}: {self.message}"


@dataclass(frozen=True)
class Settings:
    """What to run.

    Attributes:
        out: output folder.
        model: a folder or a hub id; `None` is the model that comes with vtc.
        methods: methods as text (`vtc.core.spec`), and "blind".
        keeps: budgets for each method that does not set its `keep`.
        tasks: tasks of vtc or lmms-eval, or task files.
        limit: samples per task, or a fraction of them in (0, 1); `None` for all.
        batch_size: batch size of lmms-eval's class; many accept only 1.
        device: "cpu", "cuda", "cuda:1"; `None` for a GPU if there is one.
        dtype: one of `DTYPES`; `None` for float32 on the CPU, the checkpoint's own elsewhere.
        seed: seed of sampling methods, generated data and lmms-eval.
        baselines: add missing `BASELINES`.
        lmms_model: lmms-eval's class, if the model's type is ambiguous.
        model_args: further arguments of that class, plus `attn_implementation` and `quantization`
            (one of `QUANTIZATIONS`) even if it lacks them.
        include_paths: folders with task files, or single task files, in addition to lmms-eval's.
        imports: modules with user-defined methods, names or paths.
    """

    out: Path
    model: str | None = None
    methods: tuple[str, ...] = ("todre", "fastv")
    keeps: tuple[Keep, ...] = (0.25, 0.1)
    tasks: tuple[str, ...] = ("vtc_scenes",)
    limit: int | float | None = None
    batch_size: int = 1
    device: str | None = None
    dtype: str | None = None
    seed: int = 0
    baselines: bool = True
    lmms_model: str | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    include_paths: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One (method, keep, task) to run."""

    label: str
    keep: Keep | None
    task: str
    method: vtc.Method
    blind: bool = False

    def key(self, context: Mapping[str, Any]) -> str:
        """Hash of everything that the result depends on."""
        parts = {
            "method": self.method.to_dict(),
            "blind": self.blind,
            "task": self.task,
            **context,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


class Observer:
    """Receives a run's progress; the default does nothing."""

    def planned(self, total: int, cells: int, finished: int) -> None:
        """All cells need `total` answers; `finished` of the `cells` are done already."""

    def stage(self, text: str) -> None:
        """The current stage."""

    def advanced(self, samples: int) -> None:
        """`samples` more samples are answered."""

    def finished(self, cell: Mapping[str, Any]) -> None:
        """A cell, as in results.json, is done or failed."""

    def measured(self, results: Mapping[str, Any]) -> None:
        """For `vtc bench`: rows of one precision and batch size, as in bench.json."""


_TASK_FILES = (".yaml", ".yml")


def with_task_files(settings: Settings) -> Settings:
    """`settings` with task names instead of task files, whose folders become include paths.

    Raises:
        BadInput: no such file, or a file without a task name.
    """
    names, folders = [], list(settings.include_paths)
    for task in settings.tasks:
        if not task.endswith(_TASK_FILES):
            names.append(task)
            continue
        file = Path(task).expanduser()
        try:
            text = file.read_text("utf-8")
        except (OSError, ValueError) as error:
            raise BadInput("--tasks", f"{task}: {error}") from error
        # Not parsed as YAML: its tag `!function` is lmms-eval's own.
        lines = (re.search(rf"^{key}:[ \t]*(\S.*)$", text, re.M) for key in ("group", "task"))
        found = next((line[1].partition(" #")[0].strip(" '\"\r") for line in lines if line), None)
        if found is None:
            raise BadInput("--tasks", f"{task}: expected a line `task: NAME`, found none")
        names.append(found)
        folders.append(str(file.resolve().parent))
    return replace(settings, tasks=tuple(names), include_paths=tuple(dict.fromkeys(folders)))


def bring_in(imports: Sequence[str]) -> None:
    """Import the modules of `--import`.

    Raises:
        BadInput: a module that cannot be imported.
    """
    try:
        import_modules(imports)
    except ArgumentError as error:
        raise BadInput("--import", error.message) from error


def of_method(error: ValueError | TypeError, text: str) -> BadInput:
    """The error to raise, for the option at fault, if `parse_method(text, keep)` raised `error`."""
    option, said = ("--keep", "keep") if keep_is_at_fault(error, text) else ("--methods", "method")
    return BadInput(option, f"{text}: {message_of(error, said)}")


def parse_limit(text: str) -> int | float | None:
    """`"50"` is 50 samples of a task, `"0.5"` half of them, `"1.0"` all.

    Raises:
        BadInput: neither a whole number of at least 1 nor a fraction in (0, 1].
    """
    try:
        limit: int | float = int(text)
    except ValueError:
        try:
            limit = float(text)
        except ValueError:
            limit = 0
    if limit == 1 and isinstance(limit, float):
        return None
    check_limit(limit, text)
    return limit


def check_limit(limit: int | float | None, given: str | None = None) -> None:
    if limit is None or (isinstance(limit, int) and limit >= 1) or 0 < limit < 1:
        return
    raise BadInput(
        "--limit",
        f"expected at least 1 sample, or a fraction of them in (0, 1], got {given or limit}",
    )


def parse_arguments(text: str) -> dict[str, Any]:
    """`"attn_implementation=eager,max_frames_num=8"` as a dictionary; numbers, true, false and
    none become Python values.

    Raises:
        BadInput: a part without "=", a repeated name, or unmatched brackets.
    """
    found: dict[str, Any] = {}
    try:
        parts = split_list(text)
    except ValueError as error:
        raise BadInput("--model-args", message_of(error, "text")) from None
    for part in parts:
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not name.isidentifier():
            raise BadInput("--model-args", f"expected name=value, got {part!r}")
        if name in found:
            raise BadInput("--model-args", f"{name} is given twice")
        found[name] = _read(value)
    return found


def _read(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that another option sets, and unknown quantizations."""
    for name in arguments:
        option = _OPTIONS.get(name.removeprefix("vtc_"))
        if option is not None:
            raise BadInput("--model-args", f"{name} is set by {option}")
    kind = arguments.get("quantization")
    if kind is not None and kind not in QUANTIZATIONS:
        raise BadInput(
            "--model-args",
            f"quantization: expected one of {', '.join(QUANTIZATIONS)}, got {kind!r}",
        )


def plan(settings: Settings) -> list[Cell]:
    """The cells in the order in which they run: the baselines first, without repetition.

    Raises:
        BadInput: invalid settings, as far as can be checked without the model and the data.
    """
    settings = with_task_files(settings)
    if not settings.methods:
        raise BadInput("--methods", "expected at least one method, got none")
    if not settings.tasks:
        raise BadInput("--tasks", "expected at least one task, got none")
    check_limit(settings.limit)
    check_arguments(settings.model_args)
    for path in settings.include_paths:
        if not Path(path).expanduser().exists():
            raise BadInput("--include-path", f"no folder or task file {path}")
    bring_in(settings.imports)
    if settings.batch_size < 1:
        raise BadInput("--batch-size", f"expected at least 1, got {settings.batch_size}")
    if settings.dtype is not None and settings.dtype not in DTYPES:
        raise BadInput("--dtype", f"expected one of {', '.join(DTYPES)}, got {settings.dtype!r}")
    if settings.seed < 0:
        raise BadInput("--seed", f"expected at least 0, got {settings.seed}")
    labels = [*(BASELINES if settings.baselines else ()), *settings.methods]
    labels = list(dict.fromkeys(compact(label) for label in labels))
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
            raise of_method(error, label) from error
    return [
        Cell(label, keep, task, method, blind)
        for task in dict.fromkeys(settings.tasks)
        for label, keep, method, blind in variants
    ]
