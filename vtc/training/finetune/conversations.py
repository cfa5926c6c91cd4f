# SPDX-License-Identifier: Apache-2.0
"""Batches of questions on pictures with their answers, for any processor with a chat template."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vtc.core.errors import ArgumentError
from vtc.core.settings import check_whole


class Conversations:
    """Batches of rows, each in a conversation of one question and its answer; a function of the
    step, for `finetune`, that goes through all rows in a new order each time.

    Args:
        processor: of the model; has a chat template and a tokenizer.
        rows: mappings with "question", "answer", and "image" or "images": files or pictures of PIL.
        size: rows per batch.
        folder: of relative file names.
        seed: seed of the order.

    Raises:
        ArgumentError: no rows, a row that lacks something, or a processor without a chat template.
    """

    def __init__(
        self,
        processor: Any,
        rows: Sequence[Mapping[str, Any]],
        size: int,
        folder: str | Path = ".",
        seed: int = 0,
    ) -> None:
        check_whole("size", size, lowest=1)
        if not rows:
            raise ArgumentError("rows", "expected at least one, got none")
        if getattr(processor, "chat_template", None) is None:
            raise ArgumentError("processor", "expected one with a chat template")
        for number, row in enumerate(rows):
            lacks = [name for name in ("question", "answer") if not isinstance(row.get(name), str)]
            if "image" not in row and not row.get("images"):
                lacks.append("image")
            if lacks:
                raise ArgumentError("rows", f"number {number} lacks {', '.join(lacks)}: {row}")
        self.processor, self.rows, self.size = processor, rows, size
        self.folder, self.seed = Path(folder), seed

    @classmethod
    def read(cls, processor: Any, file: str | Path, size: int, seed: int = 0) -> Conversations:
        """Batches of a JSONL file, one row a line; pictures are beside it.

        Args:
            processor, size, seed: as above.
            file: its rows have "image" or "images", "question" and "answer".

        Raises:
            ArgumentError: as above, or the file is not JSONL.
        """
        path, rows = Path(file), []
        if not path.is_file():
            raise ArgumentError("file", f"no such file: {str(file)!r}")
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ArgumentError("file", f"{path}, line {number}: {error}") from None
        return cls(processor, rows, size, path.parent, seed)

    def __call__(self, step: int) -> dict[str, Tensor]:
        """The batch of a step, with labels on the answers."""
        count = len(self.rows)
        chosen = []
        for place in range(step * self.size, (step + 1) * self.size):
            order = list(range(count))
            random.Random(f"{self.seed}:{place // count}").shuffle(order)
            chosen.append(self.rows[order[place % count]])
        return self.batch(chosen)

    def batch(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The model's inputs for some rows, with labels on the answers up to the end of the turn.

        Args:
            rows: as in the constructor.

        Raises:
            ArgumentError: the processor cut a prompt and its answer apart.
        """
        asked = [self._question(row) for row in rows]
        answered = [
            [
                *question,
                {"role": "assistant", "content": [{"type": "text", "text": row["answer"]}]},
            ]
            for question, row in zip(asked, rows, strict=True)
        ]
        batch = self._encode(answered, False)
        prompts = self._encode(asked, True)
        labels = torch.full_like(batch["input_ids"], -100)
        end = self.processor.tokenizer.eos_token_id
        for i in range(len(rows)):
            places = batch["attention_mask"][i].nonzero()[:, 0]
            ids = batch["input_ids"][i, places]
            prompt = prompts["input_ids"][i, prompts["attention_mask"][i].bool()]
            n = min(len(ids), len(prompt))
            # The last token of a prompt may be another once an answer follows.
            start = int((ids[:n] == prompt[:n]).long().cumprod(0).sum())
            ends = (ids[start:] == end).nonzero()[:, 0]
            stop = start + int(ends[-1]) + 1 if len(ends) else len(ids)
            if start == stop:
                raise ArgumentError("rows", f"found no answer in the text of {rows[i]}")
            labels[i, places[start:stop]] = ids[start:stop]
        return {**batch, "labels": labels}

    def _question(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        pictures = row.get("images") or [row["image"]]
        content: list[dict[str, Any]] = [
            {"type": "image", "image": self._picture(picture)} for picture in pictures
        ]
        return [{"role": "user", "content": [*content, {"type": "text", "text": row["question"]}]}]

    def _picture(self, picture: Any) -> Any:
        if isinstance(picture, (str, Path)):
            with Image.open(self.folder / picture) as opened:
                return opened.convert("RGB")
        return picture

    def _encode(self, conversations: list[Any], prompt: bool) -> dict[str, Tensor]:
        return dict(
            self.processor.apply_chat_template(
                conversations,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                add_generation_prompt=prompt,
                padding=True,
            )
        )
