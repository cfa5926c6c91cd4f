# SPDX-License-Identifier: Apache-2.0
"""The embedded VLM and generated scenes as the data module of `python -m vtc.training.atp`; see
`vtc.training.data.Data`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from vtc.training.atp.measure import measure as measure_heads

from .. import vlm
from ..scenes.labels import FIELD_INDEX
from ..scenes.scenes import generate
from ..score import answers, is_right, prompt_of


def load(folder: Path) -> tuple[Any, Any]:
    """The model, in fp32 and in evaluation mode, and its processor."""
    return vlm.load(torch.float32, folder)


def batches(processor: Any, split: str, size: int, first: int, steps: int) -> SceneBatches:
    """Batches of scenes, starting with number `first`."""
    return SceneBatches(processor, split, size, first, steps)


def measure(
    model: Any, processor: Any, folder: Path, count: int, first: int = 0, seeds: int = 3
) -> dict[str, Any]:
    """Evaluate hard pruning through `vtc.patch` on scenes of the test split, each with one
    question.

    Args:
        model: the model.
        processor: its processor.
        folder: folder of the heads.
        count: number of scenes.
        first: number of the first scene.
        seeds: number of runs of Random.

    Returns:
        Target and mean equivalent tokens; accuracies of the full model, with the heads, and of
        Random with equally many tokens; and correlations of an image's kept tokens with its scene's
        contents.
    """
    source = SceneBatches(processor, "test", 1, 0)
    samples = [source.sample(number) for number in range(first, first + count)]
    found = measure_heads(model, folder, lambda: judge(model, processor, samples), seeds)
    figures = summarise(samples, found.per_image, found.full, found.mine, found.drawn)
    return {"target": found.target, "first": first, **figures}


@dataclass(frozen=True)
class SceneBatches:
    """Batches of generated scenes with one question each, uniform over a scene's types of question;
    a pure function of the step.

    Args:
        processor: the model's processor.
        split: "train", "val" or "test" of `scenes.scenes`.
        size: scenes per batch.
        first: number of the first scene.
        steps: number of batches when iterated over.
    """

    processor: Any
    split: str
    size: int
    first: int
    steps: int = 0

    def __call__(self, step: int) -> dict[str, Tensor]:
        return self.batch(
            [self.sample(self.first + step * self.size + i) for i in range(self.size)]
        )

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self(step) for step in range(self.steps))

    def sample(self, number: int) -> tuple[Any, Any]:
        """A scene and one of its questions."""
        scene = generate(number, self.split)
        kinds = sorted({question.type for question in scene.questions})
        draw = random.Random(number)
        kind = draw.choice(kinds)
        return scene, draw.choice([q for q in scene.questions if q.type == kind])

    def batch(self, samples: Sequence[tuple[Any, Any]]) -> dict[str, Tensor]:
        """The model's inputs, left-padded, with labels on the answers."""
        tokenizer = self.processor.tokenizer
        texts = [
            f"{prompt_of(self.processor, question.question)} {question.answer}{tokenizer.eos_token}"
            for _, question in samples
        ]
        batch = dict(
            self.processor(
                images=[scene.image for scene, _ in samples],
                text=texts,
                return_tensors="pt",
                padding=True,
            )
        )
        labels = torch.full_like(batch["input_ids"], -100)
        for row, (_, question) in enumerate(samples):
            reply = tokenizer.encode(f" {question.answer}", add_special_tokens=False)
            labels[row, -len(reply) - 1 :] = batch["input_ids"][row, -len(reply) - 1 :]
        return {**batch, "labels": labels}


def judge(model: Any, processor: Any, samples: Sequence[tuple[Any, Any]]) -> list[bool]:
    """Whether the model answers each question right: greedy, exact match."""
    found: list[bool] = []
    for start in tqdm(range(0, len(samples), 16), desc="measure"):
        chunk = [(question, scene.image) for scene, question in samples[start : start + 16]]
        given = answers(model, processor, chunk)
        found += [is_right(a, q.answer) for a, (q, _) in zip(given, chunk, strict=True)]
    return found


def summarise(
    samples: Sequence[tuple[Any, Any]],
    per_image: Sequence[Sequence[int]],
    full: Sequence[bool],
    mine: Sequence[bool],
    drawn: Sequence[Sequence[bool]],
) -> dict[str, Any]:
    """The figures of `measure`, from tokens per layer and right answers by scene."""
    from scipy.stats import pearsonr, spearmanr

    kept = [sum(counts) / len(counts) for counts in per_image]
    columns = {
        "objects": [len(scene.objects) for scene, _ in samples],
        "objects and characters": [
            len(scene.objects) + sum(len(text.glyphs) for text in scene.prints)
            for scene, _ in samples
        ],
        "patches that show something": [
            int((scene.labels[FIELD_INDEX["role"]] > 0).sum()) for scene, _ in samples
        ],
    }
    groups = {
        "all scenes": [True for _ in samples],
        "scenes with objects": [bool(scene.objects) for scene, _ in samples],
        "scenes of objects only": [scene.kind == "objects" for scene, _ in samples],
    }
    correlation: dict[str, Any] = {}
    for group, chosen in groups.items():
        x = np.array(kept)[chosen]
        correlation[group] = {"scenes": len(x)}
        for name, values in columns.items():
            y = np.array(values)[chosen]
            found = {"pearson": pearsonr(x, y), "spearman": spearmanr(x, y)}
            correlation[group][name] = {
                kind: {"r": round(float(r.statistic), 3), "p": float(f"{r.pvalue:.1g}")}
                for kind, r in found.items()
            }
    places: dict[str, dict[str, list[int]]] = {"kind": {}, "type": {}}
    for k, (scene, question) in enumerate(samples):
        places["kind"].setdefault(scene.kind, []).append(k)
        places["type"].setdefault(question.type, []).append(k)

    def line(where: Sequence[int]) -> dict[str, float]:
        def share(right: Sequence[bool]) -> float:
            return 100 * sum(right[k] for k in where) / len(where)

        found = {
            "tokens": sum(kept[k] for k in where) / len(where),
            "full": share(full),
            "atp": share(mine),
            "random": sum(share(right) for right in drawn) / max(len(drawn), 1),
        }
        return {"questions": len(where), **{k: round(v, 1) for k, v in found.items()}}

    by_layer = np.array(per_image).mean(0)
    return {
        "split": "test",
        "scenes": len(samples),
        "tokens": round(float(np.mean(kept)), 1),
        "tokens_deviation": round(float(np.std(kept)), 1),
        "tokens_per_layer": [round(float(n), 1) for n in by_layer],
        "all": line(range(len(samples))),
        **{f"by_{what}": {n: line(w) for n, w in sorted(p.items())} for what, p in places.items()},
        "correlation of tokens kept with": correlation,
    }
