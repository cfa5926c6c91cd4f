# SPDX-License-Identifier: Apache-2.0
"""What a run of `vtc eval` works on: the model, the tasks, and what tells them from others."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import vtc

from . import parallel
from .plan import SUITE, BadInput, Settings

__all__ = [
    "Source",
    "Tasks",
    "find_source",
    "fingerprint",
    "installed_versions",
    "leaves",
    "load",
    "own_sources",
    "write_suite",
]

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


def fingerprint(folder: Path) -> str:
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


def own_sources() -> str:
    """Hash of vtc's own code: while a method is worked on, its version says nothing.

    With that of lmms-eval's classes and tasks, which ask and score, and of what writes cells.
    """
    from vtc.integrations import lmms_eval

    digest = hashlib.sha256()
    here = Path(__file__).parent
    for name in ("journal.py", "prefills.py", "results.py", "run.py", "stats.py"):
        digest.update((here / name).read_bytes())
    folders = (vtc.__file__, lmms_eval.__file__, here / "tasks" / "utils.py")
    for folder in (Path(str(file)).parent for file in folders):
        for file in sorted(f for f in folder.rglob("*") if f.suffix in (".py", ".yaml")):
            digest.update(file.relative_to(folder).as_posix().encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:20]


def installed_versions() -> dict[str, str]:
    names = ("lmms-eval", "transformers", "torch")
    return {"vtc": vtc.__version__, **{n: metadata.version(n).partition("+")[0] for n in names}}


# ---- the model and the tasks --------------------------------------------------------------------
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


@dataclass(frozen=True)
class Source:
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


def find_source(settings: Settings) -> Source:
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
    return Source(
        id="embedded" if shipped else model,
        fingerprint=commit or (fingerprint(folder) if local else model),
        builtin=builtin,
        prompts="vtc_embedded" if shipped else builtin,
        device=device,
        dtype=settings.dtype or ("float32" if kind == "cpu" else None),
    )


def load(source: Source, settings: Settings, simple: bool) -> Any:
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


class Tasks:
    """The tasks of a run, their data at hand.

    Raises:
        BadInput: unknown task, or its data is missing.
    """

    def __init__(self, settings: Settings, source: Source) -> None:
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
            parts = list(leaves(loaded))
            if name not in SUITE:
                self.data[name] = _identity(parts)
            sizes = [len(task.eval_docs) for task in parts]
            limit = settings.limit
            self.samples[name] = sum(min(n, limit) if limit else n for n in sizes)
            kinds |= {task.OUTPUT_TYPE for task in parts}
        self.generation_only = all(kind.startswith("generate") for kind in kinds)


def leaves(tasks: Mapping[Any, Any]) -> Iterator[Any]:
    for value in tasks.values():
        if isinstance(value, Mapping):
            yield from leaves(value)
        else:
            yield value[1] if isinstance(value, tuple) else value


def _identity(leaves: Sequence[Any]) -> str:
    """Hash of tasks of lmms-eval: their settings and data.

    `datasets` makes a data set's fingerprint of where it comes from: the revision on the hub, or
    the files' times here.
    """
    parts = []
    for task in leaves:
        # Functions are told apart by their names, not by where they lie in memory.
        config = re.sub(r" at 0x[0-9a-f]+", "", json.dumps(task.dump_config(), default=str))
        splits = dict(task.dataset or {})
        data = {str(k): getattr(v, "_fingerprint", None) for k, v in splits.items()}
        parts.append([config, str(task.VERSION), len(task.eval_docs), data])
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


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
