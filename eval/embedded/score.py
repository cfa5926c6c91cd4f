# SPDX-License-Identifier: Apache-2.0
"""Scores a checkpoint directly: greedy answers and exact match by type; full, blind and random.

    python -m vtc.eval.embedded.score --tasks vtc_scenes vtc_mosaic vtc_photo --out scores.json

*full* is the plain model; *blind* sees a grey picture; *random* keeps a random fraction of the
vision tokens (the language model does not attend to the others). This needs neither lmms-eval nor
the engine, so it serves to judge training checkpoints; published scores come from the harness.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from ..tasks import OWN_TASKS
from ..tasks.parquet import task_questions
from .scenes.questions import Question
from .vlm import embedded_path, load

MODES: tuple[str, ...] = ("full", "blind", "random")
GREY = (128, 128, 128)

Sample = tuple[Question, Image.Image]


def prompt_of(processor: LlavaProcessor, question: str) -> str:
    """The prompt of `question` on one picture, up to the start of the answer."""
    content: Any = [{"type": "image"}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    return str(processor.apply_chat_template(messages, add_generation_prompt=True))


def answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    samples: Sequence[Sample],
    mode: str = "full",
    keep: float = 0.05,
    seed: int = 0,
    max_new_tokens: int = 16,
) -> list[str]:
    """Greedy answers to one batch of questions.

    Args:
        model: the model.
        processor: its processor.
        samples: (question, picture) pairs.
        mode: "full", "blind" or "random".
        keep: with "random", the fraction of vision tokens to keep.
        seed: with "random", the seed.
        max_new_tokens: maximum length of an answer.

    Raises:
        ValueError: unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, not {mode!r}")
    images = [
        Image.new("RGB", image.size, GREY) if mode == "blind" else image for _, image in samples
    ]
    texts = [prompt_of(processor, question.question) for question, _ in samples]
    inputs = processor(images=images, text=texts, return_tensors="pt", padding=True)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    if mode == "random":
        is_image = inputs["input_ids"] == model.config.image_token_id
        for row, (question, _) in enumerate(samples):
            generator = torch.Generator().manual_seed(hash_of(question.id, seed))
            places = is_image[row].nonzero()[:, 0]
            count = max(1, round(keep * len(places)))
            dropped = places[torch.randperm(len(places), generator=generator)[count:]]
            inputs["attention_mask"][row, dropped] = 0
    with torch.inference_mode():
        engine: Any = model  # the stub of `generate` lacks this class
        out = engine.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = out[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def hash_of(text: str, seed: int) -> int:
    """A platform-independent seed from `text` and `seed`."""
    import zlib

    return zlib.crc32(f"{seed}:{text}".encode())


def is_right(answer: str, truth: str) -> bool:
    """Exact match after stripping and lower-casing."""
    return answer.strip().lower() == truth.strip().lower()


def score(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    samples: Sequence[Sample],
    mode: str = "full",
    keep: float = 0.05,
    batch_size: int = 16,
    seed: int = 0,
) -> dict[str, tuple[int, int]]:
    """(right answers, questions) by type, with the totals under "all".

    Args:
        model, processor, samples, mode, keep, seed: as in `answers`.
        batch_size: questions per batch.
    """
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    queue: Iterator[Sample] = iter(samples)
    while batch := list(islice(queue, batch_size)):
        given = answers(model, processor, batch, mode, keep, seed)
        for (question, _), answer in zip(batch, given, strict=True):
            for name in (question.type, "all"):
                found[name][0] += is_right(answer, question.answer)
                found[name][1] += 1
    return {name: (right, count) for name, (right, count) in sorted(found.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=embedded_path())
    parser.add_argument("--tasks", nargs="+", choices=OWN_TASKS, default=["vtc_scenes"])
    parser.add_argument("--limit", type=int, default=None)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--keep", type=float, default=0.05)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the scores")
    args = parser.parse_args()

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    model, processor = load(getattr(torch, args.dtype), args.model)
    report: dict[str, dict[str, dict[str, float]]] = {}
    for task in args.tasks:
        samples = list(task_questions(task, args.limit))
        columns = {}
        for mode in args.modes:
            since = time.monotonic()
            columns[mode] = score(model, processor, samples, mode, args.keep)
            print(f"{task} {mode}: {time.monotonic() - since:.0f} s", flush=True)
        report[task] = {
            kind: {
                "questions": columns[args.modes[0]][kind][1],
                **{m: round(100 * columns[m][kind][0] / columns[m][kind][1], 1) for m in columns},
            }
            for kind in columns[args.modes[0]]
        }
        print(f"\n{task:<14}{'n':>6}" + "".join(f"{mode:>9}" for mode in args.modes))
        for kind, row in report[task].items():
            cells = "".join(f"{row[mode]:>9.1f}" for mode in args.modes)
            print(f"{kind:<14}{row['questions']:>6.0f}{cells}")
        print(flush=True)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        weights = hashlib.sha256((args.model / "model.safetensors").read_bytes()).hexdigest()
        scores = {"weights": weights, "keep": args.keep, "suites": report}
        args.out.write_text(json.dumps(scores, indent=2) + "\n")


if __name__ == "__main__":
    main()
