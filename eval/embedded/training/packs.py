# SPDX-License-Identifier: Apache-2.0
"""Many questions on one picture in one sequence.

The picture's tokens are a shared prefix. A question attends to the prefix and itself only, at the
positions that it would have alone, so its loss and answer are exactly those of the single question,
while the prefix is computed once. A question counts as right if every token of its answer is the
most likely one, as in greedy decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast

from ..scenes.labels import FIELD_INDEX, GRID, PATCH_SIZE
from ..scenes.parts import Box
from ..scenes.questions import Asked
from ..vlm import IMAGE_TOKENS

READING = frozenset({"digits", "word", "document", "name"})


@dataclass(frozen=True)
class Pack:
    """A batch of packed sequences with b pictures, n tokens, and m answer tokens in total.

    Attributes:
        ids: (b, n) token ids, -1 at vision tokens.
        vision: (b, k) patches of the vision tokens.
        mask: (b, 1, n, n), added to the attention scores.
        where: (m, 2) batch rows and places of the tokens that predict `targets`.
        targets: (m,) token ids.
        question: (m,) question numbers.
        types: types of the questions.
        evidence: (m, 2, n) target attention of two heads; 0 without supervision.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    vision: torch.Tensor
    where: torch.Tensor
    targets: torch.Tensor
    question: torch.Tensor
    types: list[str]
    evidence: torch.Tensor


class Packer:
    """Builds packs in the exact prompt format of the chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._encode = lru_cache(maxsize=200_000)(self._encoded)
        self.head = self._encode("USER: ")
        self.tail = self._encode("\n")
        self.bos = int(tokenizer.bos_token_id)
        self.eos = int(tokenizer.eos_token_id)

    def _encoded(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def pack(self, items: Sequence[tuple[np.ndarray, Sequence[Asked]]]) -> Pack:
        """Pack pictures: for each, its k kept patches, ascending, and its questions."""
        before = [self.bos, *self.head]
        start = len(before) + IMAGE_TOKENS + len(self.tail)
        rows: list[tuple[list[int], list[int], list[int]]] = []
        types: list[str] = []
        where: list[tuple[int, int]] = []
        targets: list[int] = []
        numbers: list[int] = []
        looks: list[np.ndarray] = []
        for row, (kept, triples) in enumerate(items):
            ids = [*before, *([-1] * len(kept)), *self.tail]
            positions = [
                *range(len(before)),
                *(len(before) + kept).tolist(),
                *range(start - len(self.tail), start),
            ]
            segments = [0] * len(ids)
            for k, asked in enumerate(triples):
                prompt = self._encode(f"{asked.question} ASSISTANT:")
                reply = [*self._encode(f" {asked.answer}"), self.eos]
                looks.append(self._evidence(asked, reply, kept, len(before)))
                tokens = [*prompt, *reply[:-1]]
                first = len(ids) + len(prompt) - 1
                where += [(row, first + j) for j in range(len(reply))]
                targets += reply
                numbers += [len(types)] * len(reply)
                types.append(asked.type)
                ids += tokens
                positions += range(start, start + len(tokens))
                segments += [k + 1] * len(tokens)
            rows.append((ids, positions, segments))
        n = -(-max(len(r[0]) for r in rows) // 16) * 16
        padded = np.zeros((3, len(rows), n), dtype=np.int64)
        padded[2] = -1
        for row, columns in enumerate(rows):
            for plane, column in enumerate(columns):
                padded[plane, row, : len(column)] = column
        ids_t, positions_t, segments_t = torch.from_numpy(padded)
        a, b = segments_t[:, :, None], segments_t[:, None, :]
        seen = ((b == 0) | (a == b)) & torch.ones(n, n, dtype=torch.bool).tril()
        mask = torch.where(seen, 0.0, -1e4).to(torch.bfloat16)[:, None]
        wide = np.zeros((len(where), 2, n), dtype=np.float32)
        wide[:, :, : looks[0].shape[-1]] = np.concatenate(looks)
        return Pack(
            ids_t,
            positions_t,
            mask,
            torch.from_numpy(np.stack([kept for kept, _ in items])),
            torch.tensor(where),
            torch.tensor(targets),
            torch.tensor(numbers),
            types,
            torch.from_numpy(wide),
        )

    def _evidence(self, asked: Asked, reply: list[int], kept: np.ndarray, start: int) -> np.ndarray:
        """(reply, 2, start + kept) target attention of the tokens that predict `reply`.

        Place 0 (<s>) is the target if there is nothing to see. A count attends equally to <s> and
        to the centre of each object, so that <s> gets 1 / (1 + count).
        """
        rows = np.zeros((len(reply), 2, start + len(kept)), dtype=np.float32)
        if asked.type == "caption":
            return rows
        count = asked.type == "count"
        seen = [np.isin(kept, _patches(box, centre=count)) for box in asked.evidence]
        if not seen:
            rows[:, :, 0] = 1
        elif count:
            rows[:, :, 0] = 1
            rows[:, :, start:] = np.sum(seen, axis=0)
        elif asked.type == "relation":
            rows[:, 0, start:], rows[:, 1, start:] = seen
        elif asked.type in ("digits", "word", "document"):
            at = 0
            for row, token in zip(rows, reply, strict=True):
                row[:, start:] = seen[min(at, len(seen) - 1)]
                at += len(self._tokenizer.decode([token]).strip())
        else:
            rows[:, :, start:] = np.sum(seen, axis=0)
        return rows / np.maximum(rows.sum(-1, keepdims=True), 1e-6)


def _patches(box: Box, centre: bool) -> np.ndarray:
    """The patches well inside `box`, or only the one at its centre."""
    left, top, right, bottom = box
    x, y = (left + right) / 2, (top + bottom) / 2
    if centre:
        return np.array([int(y // PATCH_SIZE) * GRID + int(x // PATCH_SIZE)])
    middles = (np.arange(GRID) + 0.5) * PATCH_SIZE
    rows = np.abs(middles - y) <= 0.35 * (bottom - top)
    columns = np.abs(middles - x) <= 0.35 * (right - left)
    return np.flatnonzero(rows[:, None] & columns[None, :])


def evidence_loss(pack: Pack, looks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Divergence of attention `looks`, each (m, 2, n) log-probabilities, from the evidence.

    Without this supervision, a small language model takes hours to learn to look things up; with
    it, minutes.
    """
    told = pack.evidence.sum(-1).gt(0).float()
    known = pack.evidence.clamp(min=1e-9).log()
    losses = [(pack.evidence * (known - look.clamp(min=-30))).sum(-1) for look in looks]
    return torch.stack([(loss * told).sum() for loss in losses]).mean() / told.sum().clamp(min=1)


def embed(pack: Pack, table: torch.Tensor, vision: torch.Tensor) -> torch.Tensor:
    """(b, n, d) embeddings: `table` for text, `vision` (b, k, d) for the picture."""
    x = F.embedding(pack.ids.clamp(min=0), table)
    return x.masked_scatter((pack.ids < 0)[..., None], vision.to(x.dtype))


def answer_loss(
    pack: Pack, states: torch.Tensor, output: torch.Tensor
) -> tuple[torch.Tensor, list[bool]]:
    """Mean loss over the answers' tokens, and whether each question is answered right."""
    logits = (states[pack.where[:, 0], pack.where[:, 1]] @ output.T).float()
    loss = F.cross_entropy(logits, pack.targets)
    wrong = torch.zeros(len(pack.types))
    wrong.index_add_(0, pack.question, (logits.argmax(-1) != pack.targets).float())
    return loss, (wrong == 0).tolist()


def keep_patches(labels: np.ndarray, keep: int, rng: np.random.Generator) -> np.ndarray:
    """`keep` patches of labels (fields, 24, 24), ascending: centres first, then non-empty ones.

    Short sequences make the language model's first steps cheap, and lose nothing that questions
    refer to as long as all centres are kept.
    """
    if keep >= IMAGE_TOKENS:
        return np.arange(IMAGE_TOKENS)
    centre = labels[FIELD_INDEX["centre"]].reshape(-1)
    shown = labels[FIELD_INDEX["role"]].reshape(-1) > 0
    order = rng.random(IMAGE_TOKENS) + 4.0 * (centre > 0) + 0.6 * shown
    return np.sort(np.argsort(-order)[:keep])


def choose(triples: list[Asked], most: int) -> list[Asked]:
    """At most `most` questions, preferring those that need reading, which are rare."""
    return sorted(triples, key=lambda t: t.type not in READING)[:most]
