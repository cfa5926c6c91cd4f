# SPDX-License-Identifier: Apache-2.0
"""The model and the tasks of a `vtc eval` run, and their identity."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from vtc.core.errors import ArgumentError
from vtc.core.names import meant, unknown

from ..tasks import OWN_TASKS
from . import parallel
from .identity import FileHashes, code_of_functions, digest, fingerprint, named_files
from .plan import BadInput, Settings

__all__ = ["Source", "Tasks", "check_source", "find_source", "leaves", "load", "write_task"]

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
"""lmms-eval's class for each model type of transformers."""

_ONE_AT_A_TIME = ("llava_hf", "video_llava", "aria", "instructblip")
"""Classes of lmms-eval that require a batch size of 1."""


# ---- the model and the tasks --------------------------------------------------------------------
def write_task(
    name: str,
    folder: Path,
    limit: int | None = None,
    seed: int = 0,
    hashes: FileHashes | None = None,
) -> Path:
    """Generate one of `OWN_TASKS` in `folder`: its data (parquet) and its task files.

    The folder works for lmms-eval's `--include_path`. Existing data is kept if it comes from the
    same arguments, code and photos; otherwise it is replaced.

    Args:
        name: one of `OWN_TASKS`.
        folder: where to write.
        limit: number of samples; `None` for all.
        seed: seed of the generator.
        hashes: hashes of files.

    Returns:
        The parquet file.

    Raises:
        ArgumentError: unknown name.
        FileNotFoundError: the photos are missing.
    """
    if name not in OWN_TASKS:
        raise ArgumentError("name", f"expected one of {', '.join(OWN_TASKS)}, got {name!r}")
    from ..tasks import parquet

    data, made_of = folder / f"{name}.parquet", folder / f"{name}.identity"
    tasks = Path(__file__).parents[1] / "tasks"
    folder.mkdir(parents=True, exist_ok=True)
    for file in (*_SHARED_TASK_FILES, f"{name}.yaml"):
        shutil.copyfile(tasks / file, folder / file)
    identity = digest([limit, seed, parquet.identity(name, hashes or FileHashes())])
    known = made_of.read_text("utf-8") if made_of.is_file() else None
    if not data.exists() or known != identity:
        unfinished = folder / ".unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        options = {} if limit is None else {"limit": limit}
        built = parquet.build_task(name, unfinished, seed=seed, **options)
        made_of.unlink(missing_ok=True)  # or a killed process would leave it with other data
        os.replace(built, data)
        made_of.write_text(identity, "utf-8")
        shutil.rmtree(unfinished)
    return data


_SHARED_TASK_FILES = ("_vtc_template_yaml", "utils.py")


@dataclass(frozen=True)
class Source:
    """The model to load."""

    id: str
    fingerprint: str
    builtin: str
    prompts: str
    device: str
    dtype: str | None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def summary(self) -> dict[str, str]:
        return {"id": self.id, "fingerprint": self.fingerprint, "lmms_eval": self.builtin}


def _device(given: str | None) -> str:
    """The device to run on; refuses a missing one."""
    import torch

    device = given or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise BadInput("--device", f"expected cpu, cuda or cuda:0, got {device!r}") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device", f"got {device!r}, but PyTorch sees no GPU")
    return device


def _check_folder(model: str) -> None:
    """Refuse a folder without a model; hub ids pass."""
    folder = Path(model).expanduser()
    local = folder.is_dir()
    if not local and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise BadInput("--model", f"no folder {model}")
    if local and not (folder / "config.json").is_file():
        raise BadInput("--model", f"the folder {model} has no config.json: it is not a saved model")


def check_source(settings: Settings) -> None:
    """Check the device, the model and the tasks as far as possible without importing lmms-eval,
    which takes ten seconds and more.

    Raises:
        BadInput: no such device or folder, an unknown task of vtc, or one whose photos are missing.
    """
    from ..tasks import photos

    _device(settings.device)
    if settings.model is not None:
        _check_folder(settings.model)
    for name in settings.tasks:
        if name in OWN_TASKS and name != "vtc_scenes":
            try:
                photos.require_data_folder()
            except FileNotFoundError as error:
                raise BadInput("--tasks", f"{name}: {error}") from error
        elif name.startswith("vtc_") and name not in OWN_TASKS and not settings.include_paths:
            raise BadInput("--tasks", unknown(name, OWN_TASKS, "task"))


def find_source(settings: Settings, hashes: FileHashes | None = None) -> Source:
    """Find the model's configuration and, from it, lmms-eval's class.

    Args:
        settings: settings of the run.
        hashes: cached hashes of large files; by default they are read again.

    Raises:
        BadInput: no such folder, or not on the hub or in its cache; no known class of lmms-eval.
    """
    from transformers import AutoConfig

    from ..embedded.vlm import embedded_path

    device = _device(settings.device)
    kind = device.partition(":")[0]
    if device == "cuda" and parallel.world() > 1:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    model = str(embedded_path()) if settings.model is None else settings.model
    _check_folder(model)
    folder = Path(model).expanduser()
    local = folder.is_dir()
    arguments = dict(settings.model_args)
    names = ("revision", "trust_remote_code")
    options = {name: arguments[name] for name in names if name in arguments}
    try:
        config = AutoConfig.from_pretrained(folder if local else model, **options)
    except (OSError, ValueError) as error:
        if local:
            raise BadInput("--model", f"{model}: {error}") from error
        raise BadInput(
            "--model",
            f"{model} is neither a folder nor in the hub's cache, and could not be fetched from "
            f"the hub. With a network, `hf download {model}` fetches it; or give a folder. "
            f"({str(error).splitlines()[0]})",
        ) from error
    builtin = settings.lmms_model or _LMMS_CLASS.get(config.model_type)
    if builtin is None:
        raise BadInput(
            "--lmms-model",
            f"no known class of lmms-eval for the model type {config.model_type!r}; name one "
            f"(known are {', '.join(_LMMS_CLASS)})",
        )
    if settings.batch_size > 1 and builtin in _ONE_AT_A_TIME:
        raise BadInput(
            "--batch-size", f"lmms-eval's {builtin} takes 1 only, got {settings.batch_size}"
        )
    # A hub model's commit is in its configuration; a folder has none.
    commit = None if local else getattr(config, "_commit_hash", None)
    shipped = local and folder.resolve() == embedded_path().resolve()
    hashes = hashes or FileHashes()
    # Adapters and other files that arguments name.
    others = parallel.from_first(lambda: named_files(arguments, hashes))
    if commit is None:
        commit = parallel.from_first(lambda: fingerprint(folder, hashes)) if local else model
    return Source(
        id="embedded" if shipped else model,
        fingerprint=digest([commit, others]) if others else commit,
        builtin=builtin,
        prompts="vtc_embedded" if shipped else builtin,
        device=device,
        dtype=settings.dtype or ("float32" if kind == "cpu" else None),
        arguments=arguments,
    )


def load(source: Source, settings: Settings, simple: bool) -> Any:
    """Load the model with lmms-eval's class, unpatched.

    Args:
        source: the model.
        settings: settings of the run.
        simple: whether to use lmms-eval's simple class, which also gives log-likelihoods.

    Raises:
        BadInput: loading failed.
    """
    import torch
    from lmms_eval.models import get_model
    from vtc.integrations.lmms_eval import PREFIX
    from vtc.integrations.lmms_eval.models import VTC_ARGUMENTS, accepted_arguments

    from ..embedded.vlm import embedded_path

    try:
        cls = get_model(PREFIX + source.builtin, force_simple=simple)
    except ValueError as error:
        raise BadInput("--lmms-model", f"lmms-eval has no class {source.builtin!r}") from error
    path = str(embedded_path()) if source.id == "embedded" else source.id
    if Path(path).expanduser().is_dir():
        path = str(Path(path).expanduser())
    options: dict[str, Any] = {"pretrained": path, "batch_size": settings.batch_size}
    options["device"] = source.device
    accepted = accepted_arguments(cls) - {"self", "args", "kwargs", "pretrained", *VTC_ARGUMENTS}
    for name, value in source.arguments.items():
        if name not in {*accepted, "attn_implementation", "quantization"}:
            raise BadInput(
                "--model-args",
                f"lmms-eval's {source.builtin} has no {name}; it has quantization, "
                f"attn_implementation, {', '.join(sorted(accepted - {'attn_implementation'}))}",
            )
        options[name] = value
    takes_dtype = "dtype" in accepted
    if takes_dtype and source.dtype is not None:
        options["dtype"] = source.dtype
    try:
        model = cls(**options)
    except Exception as error:
        raise BadInput("--model", f"{path}: {type(error).__name__}: {error}") from error
    quantized = getattr(model.model, "is_quantized", False)  # its precision is fixed
    if source.dtype is not None and not takes_dtype and not quantized:
        model.model.to(getattr(torch, source.dtype))
    model.model.eval()
    model.vtc_keep_model = True
    return model


class Tasks:
    """The tasks of a run with their data.

    Attributes:
        manager: lmms-eval's task manager.
        data: for each task, a hash of its settings, functions and data.
        samples: for each task, the number of samples to answer.
        limits: for each task, lmms-eval's limit.
        generation_only: whether no task needs log-likelihoods.

    Raises:
        BadInput: unknown task, or its data is missing.
    """

    def __init__(
        self, settings: Settings, source: Source, hashes: FileHashes | None = None
    ) -> None:
        from lmms_eval.tasks import TaskManager, get_task_dict

        hashes = hashes or FileHashes()
        self.data: dict[str, str] = {}
        self.limits: dict[str, int | float | None] = {}
        self.samples: dict[str, int] = {}
        names = tuple(dict.fromkeys(settings.tasks))
        given = [Path(path).expanduser() for path in settings.include_paths]
        folders = [str(path if path.is_dir() else path.parent) for path in given]
        for name in names:
            if name in OWN_TASKS:
                folders.append(str(self._generate(name, settings, hashes)))
        self.manager = TaskManager(
            include_path=folders, include_defaults=False, model_name=source.prompts
        )
        index = self.manager.task_index
        if any(index.get(name, {}).get("type") != "task" for name in names):
            # Reading lmms-eval's thousands of task files takes a while.
            self.manager = TaskManager(
                include_path=folders, include_defaults=True, model_name=source.prompts
            )
            for name in names:
                if name in index and index[name] != self.manager.task_index[name]:
                    raise BadInput(
                        "--include-path", f"lmms-eval has a task {name!r} already: rename yours"
                    )
        kinds = set()
        for name in names:
            if name not in self.manager.all_tasks:
                known = [*OWN_TASKS, *self.manager.all_tasks]
                raise BadInput(
                    "--tasks",
                    f"no task {name!r}{meant(name, known)}; known are {', '.join(OWN_TASKS)} and "
                    "those of lmms-eval, which `python -m lmms_eval --tasks list` lists",
                )
            try:
                loaded = get_task_dict([name], self.manager)
            except Exception as error:
                raise BadInput("--tasks", _missing_data(name, self.manager, error)) from error
            parts = list(leaves(loaded))
            sizes = [len(task.eval_docs) for task in parts]
            if name not in OWN_TASKS:
                self.data[name] = _identity(parts, self.manager, hashes)
                self.limits[name] = _whole(settings.limit, sizes)
            limit = self.limits[name]
            self.samples[name] = sum(_taken(limit, size) for size in sizes)
            kinds |= {task.OUTPUT_TYPE for task in parts}
        self.generation_only = all(kind.startswith("generate") for kind in kinds)

    def _generate(self, name: str, settings: Settings, hashes: FileHashes) -> Path:
        """The folder of a task of vtc, with the requested number of samples."""
        from ..tasks.parquet import size_of

        try:
            limit = settings.limit
            if isinstance(limit, float):
                limit = max(1, math.ceil(limit * size_of(name)))
            shown = "all" if limit is None else limit
            folder = settings.out / "data" / f"{name}-{shown}-{settings.seed}"
            parquet = parallel.from_first(
                partial(write_task, name, folder, limit, settings.seed, hashes)
            )
        except Exception as error:  # no photo folder, a full disk, ...
            raise BadInput("--tasks", f"{name}: {error}") from error
        tasks = Path(__file__).parents[1] / "tasks"
        files = [parquet, *(tasks / file for file in (*_SHARED_TASK_FILES, f"{name}.yaml"))]
        self.data[name] = digest([hashes.of(file) for file in files])
        self.limits[name] = limit
        return folder


def _taken(limit: int | float | None, size: int) -> int:
    """Number of samples out of `size` that lmms-eval takes."""
    if limit is None:
        return size
    return math.ceil(limit * size) if limit < 1 else min(int(limit), size)


def _whole(limit: int | float | None, sizes: Sequence[int]) -> int | float | None:
    """`limit` as a number if equivalent, so that half of 20 and 10 are the same cells."""
    if limit is None or len(sizes) != 1:
        return limit
    taken = _taken(limit, sizes[0])
    return None if taken == sizes[0] else taken


def leaves(tasks: Mapping[Any, Any]) -> Iterator[Any]:
    for value in tasks.values():
        if isinstance(value, Mapping):
            yield from leaves(value)
        else:
            yield value[1] if isinstance(value, tuple) else value


def _identity(leaves: Sequence[Any], manager: Any, hashes: FileHashes) -> str:
    """Hash of lmms-eval tasks: their settings, the code of their functions, and their data.

    `datasets` derives a fingerprint from the source: the revision on the hub, or the times of local
    files. Local files that the task file names are hashed as well; pictures that only rows name are
    not.
    """
    parts = []
    for task in leaves:
        settings = task.dump_config()
        # Functions are identified by their code, not by their address.
        config = re.sub(r" at 0x[0-9a-f]+", "", json.dumps(settings, default=str))
        code = code_of_functions(_functions(task.config))
        splits = dict(task.dataset or {})
        data = {str(k): getattr(v, "_fingerprint", None) for k, v in splits.items()}
        places = [settings.get("dataset_path"), settings.get("dataset_kwargs")]
        files = named_files(places, hashes)
        parts.append([config, code, str(task.VERSION), len(task.eval_docs), data, files])
    return digest(parts)


def _functions(value: Any) -> Iterator[Callable[..., Any]]:
    """The functions anywhere in a task's configuration."""
    if callable(value) and not isinstance(value, type):
        yield value
    elif hasattr(value, "__dataclass_fields__"):  # first, as lmms-eval's are mappings as well
        yield from _functions(dict(vars(value)))
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _functions(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _functions(each)


def _missing_data(name: str, manager: Any, error: BaseException) -> str:
    """The message for a task whose data could not be loaded."""
    cause = getattr(error, "last_attempt", None)  # lmms-eval retries with tenacity
    if cause is not None and cause.exception() is not None:
        error = cause.exception()
    where = manager._get_config(name).get("dataset_path") if name in manager.all_subtasks else None
    what = f"its data {where!r}" if where else "its data"
    return (
        f"{name}: {what} could not be loaded, from the cache or the hub. With a network, "
        f"`hf download --repo-type dataset {where or 'NAME'}` fetches it; the tasks "
        f"{', '.join(OWN_TASKS)} need none. ({type(error).__name__}: {str(error).splitlines()[0]})"
    )
