# SPDX-License-Identifier: Apache-2.0
"""Accuracy of a second question on the same image, on the kept cache.

    python -m vtc.eval.analysis.multiturn --methods fastv,sparsevlm,visionzip --keep 0.1 --count 120

A method that reads the question keeps what the *first* question needs and may drop what the second
needs. Here every dialogue has two questions with evidence in different places, scored three ways:
the first question, the second on the cache of the first, and the second asked afresh, with the
image compressed for it. "Cost of the kept cache" is afresh minus on the cache. The full model pays
it, too, for the earlier turn; only the excess is due to a method.

The embedded model was trained on single questions (in packs, whose questions do not see one
another), never on dialogues. Its accuracy in a second turn was therefore measured first, on 40
scenes of the validation split per type of second question: afresh it answers all of them right; in
a second turn 95 % of "attribute", 90 % of "position" and 75 % of "relation". `SECOND` holds the
first two; scores use the test split. Of four formats of the turn none was clearly better (90 to 96
right of 120); `JOINT` is the shortest.
"""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

import vtc
from vtc.core.errors import ArgumentError
from vtc.core.settings import check_choice, check_whole
from vtc.core.spec import parse_keep, parse_method, split_list, takes_keep

from ..embedded.scenes.parts import Box
from ..embedded.scenes.questions import Question
from ..embedded.scenes.scenes import SPLITS, generate
from ..embedded.score import is_right, prompt_of
from ..embedded.vlm import load
from ..harness.autotune import paired_interval

__all__ = ["METHODS", "SECOND", "Dialogue", "Scores", "afresh", "converse", "dialogues", "score"]

SECOND: tuple[str, ...] = ("attribute", "position")
"""Types of second questions on which the plain model keeps its accuracy."""

JOINT = "{question} ASSISTANT:"
"""Text after the end of the first answer."""

METHODS: dict[str, bool] = {
    "fastv": True,
    "sparsevlm": True,
    "mmtok": True,
    "cdpruner": True,
    "visionzip": False,
    "divprune": False,
    "todre": False,
}
"""Methods to compare, and whether their selection depends on the question."""

AWARE = {**METHODS, "atp": True, "pyramiddrop": True, "transprune": True, "catp": True}
"""The same, including methods compared only on request, such as those that need weights."""

MAX_NEW_TOKENS = 16


@dataclass(frozen=True)
class Dialogue:
    """Two questions on one picture, with evidence in different places."""

    image: Image.Image
    first: Question
    second: Question


def dialogues(
    count: int, split: str = "test", seed: int = 0, types: Sequence[str] = SECOND
) -> Iterator[Dialogue]:
    """Dialogues on generated scenes, one per scene, cycling through the types of second questions.

    The first question has another type, and its evidence does not overlap the second's.

    Args:
        count: number of dialogues.
        split: of `SPLITS`.
        seed: number of the first scene.
        types: types of second questions.

    Raises:
        ArgumentError: `count` below 1, no types, or an unknown split.
    """
    check_whole("count", count, lowest=1)
    if not types:
        raise ArgumentError("types", "expected at least one, got none")
    check_choice("split", split, SPLITS)
    number, found = seed * 1_000_000, 0
    while found < count:
        scene = generate(number, split)
        number += 1
        pair = _pair(scene.questions, types[found % len(types)])
        if pair is not None:
            found += 1
            yield Dialogue(scene.image, *pair)


def _pair(questions: Sequence[Question], kind: str) -> tuple[Question, Question] | None:
    for second in questions:
        if second.type != kind or not second.evidence:
            continue
        for first in questions:
            apart = first.evidence and not _touch(first.evidence, second.evidence)
            if first.type != kind and apart:
                return first, second
    return None


def _touch(some: Sequence[Box], others: Sequence[Box]) -> bool:
    """Whether any box of `some` overlaps any of `others`."""
    return any(
        a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for a in some for b in others
    )


# ---- asking -------------------------------------------------------------------------------------
def afresh(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    image: Image.Image,
    question: str,
) -> str:
    """The greedy answer to a single question."""
    answer, _, _ = _first(model, processor, image, question)
    return answer


def converse(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    image: Image.Image,
    first: str,
    second: str,
) -> tuple[str, str]:
    """Greedy answers to two questions, the second on the cache of the first."""
    answer, sequence, cache = _first(model, processor, image, first)
    tokenizer: Any = processor.tokenizer
    more = tokenizer.encode(JOINT.format(question=second), add_special_tokens=False)
    if int(sequence[0, -1]) != tokenizer.eos_token_id:  # truncated at the maximum length
        more = [tokenizer.eos_token_id, *more]
    ids = torch.cat([sequence, sequence.new_tensor([more])], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), _cache_name(model): cache}
    answers, _ = _generate(model, inputs)
    return answer, _text(processor, answers, ids.shape[1])


def _first(model: Any, processor: Any, image: Image.Image, question: str) -> tuple[str, Any, Any]:
    """(answer, all tokens (1, n), cache) of a single question."""
    inputs = processor(images=image, text=prompt_of(processor, question), return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    sequence, cache = _generate(model, dict(inputs))
    return _text(processor, sequence, inputs["input_ids"].shape[1]), sequence, cache


def _generate(model: Any, inputs: dict[str, Any]) -> tuple[Any, Any]:
    with torch.inference_mode():
        out = model.generate(
            **inputs,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
        )
    cache = getattr(out, "past_key_values", None)
    return out.sequences, out.cache if cache is None else cache


def _cache_name(model: Any) -> str:
    """Name of `forward`'s cache argument, which transformers 5.24 changed."""
    names = inspect.signature(type(model).forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def _text(processor: Any, sequence: Any, start: int) -> str:
    return str(processor.decode(sequence[0, start:], skip_special_tokens=True)).strip()


# ---- scoring ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Scores:
    """Accuracies of one method on the same dialogues, as fractions.

    Attributes:
        label: the method as text; "full" for the plain model.
        query_aware: whether it reads the question; `None` for the plain model.
        dialogues: number of dialogues.
        tokens: vision tokens of an image at prefill, mean over the decoder layers.
        first: accuracy on first questions.
        second: accuracy on second questions on the kept cache.
        fresh: accuracy on second questions asked afresh.
        cost: `fresh` minus `second`.
        interval: paired 95 % interval of `cost`.
        right: for each dialogue, whether (first, second, fresh) were right.
    """

    label: str
    query_aware: bool | None
    dialogues: int
    tokens: float
    first: float
    second: float
    fresh: float
    cost: float
    interval: tuple[float, float]
    right: tuple[tuple[bool, bool, bool], ...]


def score(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    method: vtc.Method | str,
    talks: Sequence[Dialogue],
    label: str | None = None,
    query_aware: bool | None = None,
) -> Scores:
    """Ask all dialogues with `method`.

    Args:
        model: the model, unpatched before and after.
        processor: its processor.
        method: the method, or its name.
        talks: the dialogues.
        label: label of the result; by default the method's name.
        query_aware: whether the method reads the question.

    Raises:
        ArgumentError: no dialogues.
    """
    if not talks:
        raise ArgumentError("talks", "expected at least one dialogue, got none")
    right = []
    with vtc.patch(model, method) as patch:
        for talk in talks:
            one, two = converse(
                model, processor, talk.image, talk.first.question, talk.second.question
            )
            alone = afresh(model, processor, talk.image, talk.second.question)
            right.append(
                (
                    is_right(one, talk.first.answer),
                    is_right(two, talk.second.answer),
                    is_right(alone, talk.second.answer),
                )
            )
        tokens = patch.report.equivalent_tokens
    first, second, fresh = (sum(column) / len(right) for column in zip(*right, strict=True))
    pairs = [float(alone) - float(two) for _, two, alone in right]
    cost, low, high = paired_interval([pairs], 0.95)
    name = label or (method if isinstance(method, str) else method.name)
    return Scores(
        name, query_aware, len(right), tokens, first, second, fresh, cost, (low, high), tuple(right)
    )


def table(scores: Sequence[Scores]) -> Any:
    """The scores as a table for the terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    drawn = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    drawn.add_column("method", overflow="fold")
    drawn.add_column("reads the question")
    headers = ("tokens, mean", "1st, %", "2nd on the cache, %", "2nd afresh, %")
    for header in (*headers, "cost of the kept cache, points"):
        drawn.add_column(header, justify="right")
    for s in scores:
        low, high = (100 * x for x in s.interval)
        drawn.add_row(
            s.label, {True: "yes", False: "no", None: "–"}[s.query_aware], f"{s.tokens:.1f}",
            f"{100 * s.first:.1f}", f"{100 * s.second:.1f}", f"{100 * s.fresh:.1f}",
            f"{100 * s.cost:+.1f} [{low:+.1f}, {high:+.1f}]",
        )  # fmt: skip
    return drawn


def main() -> None:
    from rich.console import Console

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--keep", type=parse_keep, default=0.1)
    parser.add_argument("--count", type=int, default=120)
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--types", nargs="+", default=list(SECOND))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the scores")
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    names = split_list(args.methods)
    made = {n: parse_method(n, args.keep if takes_keep(n) else None) for n in names}
    model, processor = load()
    talks = list(dialogues(args.count, args.split, args.seed, args.types))
    found = [score(model, processor, "full", talks)]
    for name, method in made.items():
        aware = AWARE.get(method.name)
        found.append(score(model, processor, method, talks, name, aware))
    Console(width=120).print(table(found))
    if args.out is not None:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        written = {"settings": settings, "scores": [asdict(s) for s in found]}
        args.out.write_text(json.dumps(written, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
