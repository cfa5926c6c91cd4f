# SPDX-License-Identifier: Apache-2.0
"""vtc's tasks as parquet files for `datasets`, and thus for lmms-eval.

Columns: `id`, `image` (a PNG, as stored by the `Image` feature of `datasets`), `question`, `answer`
and `type`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vtc.core.settings import check_choice, check_whole

from ..embedded.scenes.questions import TYPES, Question
from ..embedded.scenes.scenes import generate
from ..harness.identity import FileHashes, code_of_files
from . import OWN_TASKS
from .photos import dev_rows, require_data_folder

DEFAULT_LIMIT = 400
_MOST_FROM_ONE_SCENE = 3


def scene_questions(
    limit: int, seed: int = 0, split: str = "test"
) -> Iterator[tuple[Question, Image.Image]]:
    """Questions on generated scenes, balanced over types and over the answers yes and no.

    A scene contributes at most three questions, of different types.

    Args:
        limit: number of questions, at least 1.
        seed: seed of the scenes.
        split: "train", "val" or "test".

    Raises:
        ValueError: `limit` below 1.
    """
    check_whole("limit", limit, lowest=1)
    quota = {kind: limit // len(TYPES) + (k < limit % len(TYPES)) for k, kind in enumerate(TYPES)}
    halves = {
        (kind, answer): (quota[kind] + (answer == "yes")) // 2
        for kind in ("existence", "relation")
        for answer in ("yes", "no")
    }
    number = seed * 1_000_000
    while any(quota.values()):
        scene = generate(number, split)
        number += 1
        taken, seen = 0, set()
        for question in scene.questions:
            half = (question.type, question.answer)
            full = not quota[question.type] or not halves.get(half, 1)
            if full or question.type in seen or taken == _MOST_FROM_ONE_SCENE:
                continue
            quota[question.type] -= 1
            if half in halves:
                halves[half] -= 1
            seen.add(question.type)
            taken += 1
            yield question, scene.image


def task_questions(
    name: str, limit: int | None = None, seed: int = 0
) -> Iterator[tuple[Question, Image.Image]]:
    """The questions of a task with their pictures.

    `vtc_photo` and `vtc_mosaic` are the dev rows in `VTC_DATA`.

    Args:
        name: one of `OWN_TASKS`.
        limit: number of questions; `None` for the task's default. Of photo rows, every n-th.
        seed: seed of the scenes, or the offset among photo rows.

    Raises:
        ValueError: unknown task.
        FileNotFoundError: the photos are missing.
    """
    check_choice("name", name, OWN_TASKS)
    if name == "vtc_scenes":
        yield from scene_questions(DEFAULT_LIMIT if limit is None else limit, seed)
        return
    rows = [(question, images[0]) for question, images in dev_rows(name.removeprefix("vtc_"))]
    count = len(rows) if limit is None else min(limit, len(rows))
    # rows are grouped by one question of each type; a stride coprime to the group keeps the mix
    for k in range(count):
        yield rows[(seed + k * len(rows) // count) % len(rows)]


def size_of(name: str) -> int:
    """The default number of questions of a task."""
    if name == "vtc_scenes":
        return DEFAULT_LIMIT
    rows = require_data_folder() / f"{name.removeprefix('vtc_')}_dev.jsonl"
    return sum(1 for line in rows.read_text("utf-8").splitlines() if line.strip())


def identity(name: str, hashes: FileHashes) -> list[str]:
    """Hashes of what a task's questions and pictures depend on besides `limit` and `seed`: the
    generating code, the rows and the photos."""
    parts = [code_of_files([Path(__file__)])]
    if name != "vtc_scenes":
        folder = require_data_folder()
        files = (f"{name.removeprefix('vtc_')}_dev.jsonl", "photos.zip")
        parts += [hashes.of(folder / file) for file in files]
    return parts


def build_task(name: str, out_dir: Path | str, limit: int | None = None, seed: int = 0) -> Path:
    """Write a task's parquet file, atomically, unless it exists.

    The same arguments give the same file.

    Args:
        name: one of `OWN_TASKS`.
        out_dir: folder.
        limit, seed: as in `task_questions`.

    Returns:
        The file's path.

    Raises:
        ValueError: unknown task.
        FileNotFoundError: the photos are missing.
    """
    check_choice("name", name, OWN_TASKS)
    settings = {"name": name, "limit": limit, "seed": seed, "of": identity(name, FileHashes())}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    path = Path(out_dir) / f"{name}-{key}.parquet"
    if path.is_file():
        return path
    columns: dict[str, list[object]] = {
        k: [] for k in ("id", "image", "question", "answer", "type")
    }
    for question, image in task_questions(name, limit, seed):
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format="PNG")
        columns["id"].append(question.id)
        columns["image"].append({"bytes": buffer.getvalue(), "path": f"{question.id}.png"})
        columns["question"].append(question.question)
        columns["answer"].append(question.answer)
        columns["type"].append(question.type)
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("image", picture),
            ("question", pa.string()),
            ("answer", pa.string()),
            ("type", pa.string()),
        ],
        # makes `datasets` read the struct as a picture
        metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}})},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    pq.write_table(pa.table(columns, schema=schema), temporary)
    temporary.replace(path)
    return path


_STRING = {"dtype": "string", "_type": "Value"}
_FEATURES = {
    "id": _STRING,
    "image": {"_type": "Image"},
    "question": _STRING,
    "answer": _STRING,
    "type": _STRING,
}
