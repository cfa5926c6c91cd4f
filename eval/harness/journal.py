# SPDX-License-Identifier: Apache-2.0
"""The answers of an unfinished cell of `vtc eval`, so that a killed run loses at most one sample.

lmms-eval's own response cache stores a task's answers only when all are there, leaves out empty
ones, and does not record tokens and times. So answers are written here as they arrive, one
line of JSON per request (per batch, if the model answers several at once):

    journal/KEY.PROCESS.jsonl
        {"names": [...],        the requests; see `_names`
         "answers": [[text, token counts or null], ...],
         "prefills": [...]}     from the patch's report

KEY is the cell's key, a hash of everything that its answers depend on: another model, method, task,
limit, seed or version gives another file. An incomplete last line, from a killed process, is cut
off. The files are deleted once the cell's results are written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vtc.core.prefill import Prefill
from vtc.report import Report

from . import prefills

__all__ = ["Journal", "SampleError", "answers_in"]


class SampleError(RuntimeError):
    """A sample could not be answered; names it and the error."""


class Journal:
    """The journal of one cell in one process.

    Args:
        folder: folder of all journals of a run; made on the first write.
        key: the cell's key.
        process: number of this process; each writes its own file and reads all.
        seed: seed of requests whose answers are sampled.
        batch: number of requests that the model answers at once.

    Attributes:
        prefills: prefills of all answered requests in order, including journalled ones.
    """

    def __init__(
        self, folder: Path, key: str, *, process: int = 0, seed: int = 0, batch: int = 1
    ) -> None:
        self.folder, self.key = folder, key
        self.path = folder / f"{key}.{process}.jsonl"
        self.seed, self.batch = seed, batch
        self.prefills: list[Prefill] = []

    def answers(
        self,
        kind: str,
        requests: Sequence[Any],
        ask: Callable[[list[Any]], list[Any]],
        report: Report,
        progress: Callable[[int], None] | None = None,
    ) -> list[Any]:
        """lmms-eval's `GenerationResult`s for `requests`; those in the journal are not asked again.

        Args:
            kind: name of lmms-eval's method that answers them.
            requests: lmms-eval's requests.
            ask: calls the model, which reports its own progress.
            report: the patch's report; it is reset.
            progress: receives the number of answers found in the journal.

        Raises:
            SampleError: a sample could not be answered.
            OSError: the answer could not be written.
        """
        from lmms_eval.api.instance import GenerationResult, TokenCounts
        from transformers import set_seed

        names = _names(kind, requests)
        known = self._read()
        found: dict[int, Any] = {}
        for batch in _batches(requests, self.batch):
            mine = tuple(names[i] for i in batch)
            record = known.get(mine)
            if record is None:
                # Sampling must not depend on earlier answers.
                set_seed(int(_digest([self.seed, mine])[:8], 16))
                report.reset()
                answers = _asked([requests[i] for i in batch], ask)
                record = _record(mine, answers, report)
                self._append(record)
            elif progress is not None:
                progress(len(batch))
            self.prefills += [prefills.from_json(p) for p in record["prefills"]]
            for i, (text, counts) in zip(batch, record["answers"], strict=True):
                # lmms-eval expects (loss, greedy) as a tuple.
                value = tuple(text) if kind == "loglikelihood" else text
                found[i] = GenerationResult(value, TokenCounts(**counts) if counts else None)
        set_seed(self.seed)  # some tasks sample when scoring
        return [found[i] for i in range(len(requests))]

    def remove(self) -> None:
        """Delete the files of all processes."""
        for file in self._files():
            file.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.key}.*.jsonl"))

    def _read(self) -> dict[tuple[str, ...], dict[str, Any]]:
        known = {}
        for file in self._files():
            content, end = file.read_bytes(), 0
            while (stop := content.find(b"\n", end)) >= 0:
                record = _parsed(content[end:stop])
                if record is None:  # a power loss may leave anything
                    break
                known[tuple(record["names"])] = record
                end = stop + 1
            if file == self.path and end < len(content):
                os.truncate(file, end)  # or the next line would be appended to it
        return known

    def _append(self, record: Mapping[str, Any]) -> None:
        line = memoryview((json.dumps(record) + "\n").encode())
        self.folder.mkdir(parents=True, exist_ok=True)
        # Unbuffered: once written, it survives the process.
        with self.path.open("ab", buffering=0) as file:
            while line:
                line = line[file.write(line) :]


def answers_in(folder: Path) -> int:
    """Number of answers in the journals of a folder."""
    records = (
        _parsed(line)
        for file in folder.glob("*.jsonl")
        for line in file.read_bytes().split(b"\n")[:-1]
    )
    return sum(len(record["answers"]) for record in records if record is not None)


def _asked(requests: list[Any], ask: Callable[[list[Any]], list[Any]]) -> list[Any]:
    which = ", ".join(f"{r.task_name}/{r.doc_id}" for r in requests)
    try:
        answers = ask(requests)
    except Exception as error:
        raise SampleError(f"{which}: {type(error).__name__}: {error}") from error
    if len(answers) != len(requests):  # checked before they are journalled
        raise SampleError(f"{which}: {len(answers)} answers to {len(requests)} requests")
    return answers


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
        return record if len(record["names"]) == len(record["answers"]) else None
    except (ValueError, KeyError, TypeError):
        return None


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=lambda v: type(v).__name__)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _names(kind: str, requests: Sequence[Any]) -> list[str]:
    """Names of requests: hashes of task, sample, prompt and settings, numbered if repeated."""
    seen: Counter[str] = Counter()
    names = []
    for request in requests:
        plain = [a for a in request.args if isinstance(a, (str, int, dict))]
        name = _digest([kind, request.task_name, request.doc_id, request.idx, plain])
        names.append(f"{name}-{seen[name]}")
        seen[name] += 1
    return names


def _batches(requests: Sequence[Any], size: int) -> list[list[int]]:
    """Indices of requests to ask together: same settings, similar length, the longest first.

    Batches are cut from all requests, not from the remaining ones, so that they are the same after
    a restart.
    """
    if size == 1:
        return [[i] for i in range(len(requests))]
    groups: dict[str, list[int]] = {}
    for i, request in enumerate(requests):
        settings = _digest([a for a in request.args if isinstance(a, dict)])
        groups.setdefault(settings, []).append(i)
    batches = []
    for group in groups.values():
        group.sort(key=lambda i: -len(str(requests[i].args[0])))
        batches += [group[i : i + size] for i in range(0, len(group), size)]
    return batches


def _record(names: Sequence[str], answers: Sequence[Any], report: Report) -> dict[str, Any]:
    from lmms_eval.api.instance import unwrap_generation_output

    unwrapped = [unwrap_generation_output(answer) for answer in answers]
    return {
        "names": list(names),
        "answers": [[text, counts and counts.to_dict()] for text, counts in unwrapped],
        "prefills": [prefills.to_json(prefill) for prefill in report.prefills],
    }
