# SPDX-License-Identifier: Apache-2.0
"""Questions on a scene.

A question refers only to unique things, yes and no are equally frequent in each scene, and counts
are drawn uniformly from those that occur, so that guessing does not pay.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .drawing import COLORS, SHAPES
from .labels import REGIONS
from .parts import Box, Print, SceneObject


class Asked(NamedTuple):
    """A question with its answer and its evidence in the picture.

    `evidence` has one box per object or tile that the answer refers to (both objects of a relation,
    in the question's order), or one per character to read. It is empty if the answer is no or 0
    because there is no such thing.
    """

    question: str
    answer: str
    type: str
    evidence: tuple[Box, ...] = ()


@dataclass(frozen=True)
class Question:
    """A question on one picture, its only right answer, and the boxes of its evidence."""

    id: str
    question: str
    answer: str
    type: str
    evidence: tuple[Box, ...] = ()


TYPES: tuple[str, ...] = (
    "existence", "attribute", "count", "position", "relation", "digits", "word", "document",
)  # fmt: skip

_APART = 34.0
"""Minimum distance in pixels along an axis for questions on "left of" and "above"."""


def compose(
    objects: tuple[SceneObject, ...], prints: tuple[Print, ...], rng: np.random.Generator
) -> list[Asked]:
    """All questions on a scene with these objects and texts, in random order."""
    triples: list[Asked] = []
    if objects:
        triples += _existence(objects, rng)
        triples += _attribute(objects, rng)
        triples += _count(objects, rng)
        triples += _position(objects, rng)
        triples += _relation(objects, rng)
    triples += _reading(prints, rng)
    order = rng.permutation(len(triples)).tolist()
    return [triples[i] for i in order]


def _pick(rng: np.random.Generator, pool: list[str]) -> str:
    return pool[int(rng.integers(len(pool)))]


def _box(item: SceneObject) -> Box:
    x, y, r = item.x, item.y, item.radius
    return x - r, y - r, x + r, y + r


def _boxes(objects: tuple[SceneObject, ...], description: str) -> tuple[Box, ...]:
    """Boxes of the objects that match `description` ("red", "square", "red square")."""
    words = [w for w in description.split() if w in COLORS or w in SHAPES]
    return tuple(_box(o) for o in objects if all(w in (o.color, o.shape) for w in words))


def _name(item: SceneObject) -> str:
    return f"{item.color} {item.shape}"


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _plural(noun: str) -> str:
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def _unique(objects: tuple[SceneObject, ...]) -> list[SceneObject]:
    """Objects whose combination of colour and shape occurs once."""
    names = Counter(_name(o) for o in objects)
    return [o for o in objects if names[_name(o)] == 1]


def _existence(objects: tuple[SceneObject, ...], rng: np.random.Generator) -> list[Asked]:
    """One yes and one no, on a shape, a colour, or both; a no on both combines parts that occur."""
    shapes, colors = sorted({o.shape for o in objects}), sorted({o.color for o in objects})
    names = {_name(o) for o in objects}
    draw = rng.random()
    if draw < 0.25:
        yes = _pick(rng, shapes)
        no = _pick(rng, [s for s in SHAPES if s not in shapes] or ["?"])
    elif draw < 0.5:
        yes = f"{_pick(rng, colors)} object"
        no = f"{_pick(rng, [c for c in COLORS if c not in colors] or ['?'])} object"
    else:
        yes = _pick(rng, sorted(names))
        crossed = [f"{c} {s}" for c in colors for s in shapes if f"{c} {s}" not in names]
        every = [f"{c} {s}" for c in COLORS for s in SHAPES if f"{c} {s}" not in names]
        no = _pick(rng, crossed if crossed and rng.random() < 0.6 else every)
    if "?" in no:  # every shape or colour occurs: ask about neither
        return []
    return [
        Asked(f"Is there {_article(yes)}?", "yes", "existence", _boxes(objects, yes)),
        Asked(f"Is there {_article(no)}?", "no", "existence"),
    ]


def _attribute(objects: tuple[SceneObject, ...], rng: np.random.Generator) -> list[Asked]:
    """The colour of a shape that occurs once, and the shape of a colour that occurs once."""
    shapes, colors = Counter(o.shape for o in objects), Counter(o.color for o in objects)
    of_shape = [
        Asked(f"What color is the {o.shape}?", o.color, "attribute", (_box(o),))
        for o in objects
        if shapes[o.shape] == 1
    ]
    of_color = [
        Asked(f"What shape is the {o.color} object?", o.shape, "attribute", (_box(o),))
        for o in objects
        if colors[o.color] == 1
    ]
    chosen = []
    for pool in (of_shape, of_color):
        for i in rng.permutation(len(pool))[:2].tolist():
            chosen.append(pool[i])
    return chosen


def _count(objects: tuple[SceneObject, ...], rng: np.random.Generator) -> list[Asked]:
    """Two counts of a colour, a shape or all objects, uniform over the counts that occur."""
    shapes, colors = Counter(o.shape for o in objects), Counter(o.color for o in objects)
    pools: dict[int, list[tuple[str, str]]] = {}
    for shape in SHAPES:
        pools.setdefault(shapes[shape], []).append((_plural(shape), shape))
    for color in COLORS:
        pools.setdefault(colors[color], []).append((f"{color} objects", color))
    pools.setdefault(len(objects), []).append(("objects", ""))
    chosen: list[Asked] = []
    for count in rng.permutation(sorted(pools))[:3].tolist():
        if count == 0 and rng.random() < 0.5:
            continue
        noun, what = pools[count][int(rng.integers(len(pools[count])))]
        evidence = _boxes(objects, what)
        chosen.append(Asked(f"How many {noun} are there?", str(count), "count", evidence))
    return chosen[:2]


def _position(objects: tuple[SceneObject, ...], rng: np.random.Generator) -> list[Asked]:
    """Which object is in a ninth of the picture, and in which ninth an object is."""
    chosen: list[Asked] = []
    for i in rng.permutation(len(objects))[:2].tolist():
        item = objects[i]
        question = f"Which object is at the {REGIONS[item.region]}?"
        chosen.append(Asked(question, _name(item), "position", (_box(item),)))
    unique = _unique(objects)
    for i in rng.permutation(len(unique))[:2].tolist():
        item = unique[i]
        question = f"Where is the {_name(item)}?"
        chosen.append(Asked(question, REGIONS[item.region], "position", (_box(item),)))
    return chosen


def _relation(objects: tuple[SceneObject, ...], rng: np.random.Generator) -> list[Asked]:
    """Left of, and above: one yes and one no about two objects that occur once."""
    unique = _unique(objects)
    if len(unique) < 2:
        return []
    a, b = (unique[i] for i in rng.permutation(len(unique))[:2].tolist())
    axes = [
        (phrase, low, high)
        for phrase, low, high in (
            ("left of", *((a, b) if a.x < b.x else (b, a))),
            ("above", *((a, b) if a.y < b.y else (b, a))),
        )
        if (high.x - low.x if phrase == "left of" else high.y - low.y) > _APART
    ]
    if not axes:
        return []
    phrase, low, high = axes[int(rng.integers(len(axes)))]
    return [
        Asked(f"Is the {_name(a)} {phrase} the {_name(b)}?", answer, "relation", (_box(a), _box(b)))
        for a, b, answer in ((low, high, "yes"), (high, low, "no"))
    ]


def _reading(prints: tuple[Print, ...], rng: np.random.Generator) -> list[Asked]:
    """Every printed number, word and value; a text is identified by its colour, unless it is the
    only one."""
    triples: list[Asked] = []
    for role, kind in (("number", "digits"), ("word", "word")):
        texts = [p for p in prints if p.role == role]
        for text in texts:
            if len(texts) == 1 and rng.random() < 0.5:
                question = f"What {role} is shown?"
            else:
                question = f"What is the {text.color} {role}?"
            triples.append(Asked(question, text.text, kind, text.boxes))
    for text in prints:
        if text.role == "value":
            question = f"What is the value of {text.key}?"
            triples.append(Asked(question, text.text, "document", text.boxes))
    return triples
