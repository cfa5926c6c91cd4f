# SPDX-License-Identifier: Apache-2.0
"""The generated scenes: the same everywhere, fair to guessers, and with answers that are true."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from vtc.eval.embedded.scenes.drawing import COLORS, SHAPES
from vtc.eval.embedded.scenes.labels import (
    CHAR_INDEX,
    COLOR_INDEX,
    FIELD_INDEX,
    FIELDS,
    GRID,
    PATCH_SIZE,
    REGIONS,
    ROLE_INDEX,
    SHAPE_INDEX,
    patch_of,
)
from vtc.eval.embedded.scenes.questions import TYPES, Question
from vtc.eval.embedded.scenes.scenes import SPLITS, Scene, generate
from vtc.eval.embedded.scenes.words import WORDS, split_of
from vtc.eval.tasks.parquet import build_task, scene_questions
from vtc.eval.tasks.photos import data_folder, dev_rows, read_rows, require_data_folder


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [generate(seed, "test") for seed in range(600)]


def test_a_seed_gives_the_same_scene_twice() -> None:
    for seed in range(12):
        first, second = generate(seed, "val"), generate(seed, "val")
        assert first == second
        assert first.questions == second.questions
        assert np.array_equal(first.pixels(), second.pixels())
        assert np.array_equal(first.labels, second.labels)


def test_layout_and_questions_are_pinned() -> None:
    """What scenes hold must not drift unnoticed: scores are only comparable on the same scenes."""
    text = repr(
        [[(q.question, q.answer) for q in generate(s, "test").questions] for s in range(40)]
    )
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "20b67c9dd16b5a15"


def test_splits_show_different_scenes_and_texts() -> None:
    shown: dict[str, set[str]] = {}
    for split in SPLITS:
        texts = [p.text for s in range(400) for p in generate(s, split).prints if p.role != "key"]
        assert all(split_of(t) == split for t in texts)
        shown[split] = set(texts)
        assert len(shown[split]) > 100
    assert not shown["train"] & shown["test"]
    assert not shown["val"] & shown["test"]
    assert generate(3, "train").objects != generate(3, "test").objects
    assert {split_of(w) for w in WORDS} == set(SPLITS)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="split"):
        generate(0, "dev")


def test_pictures_are_336_pixels_and_labels_fit(scenes: list[Scene]) -> None:
    sizes = np.array(list(FIELDS.values()))
    for scene in scenes[:40]:
        assert scene.image.size == (336, 336)
        assert scene.image.mode == "RGB"
        assert scene.labels.shape == (len(FIELDS), GRID, GRID)
        assert (scene.labels.max(axis=(1, 2)) < sizes).all()


def test_objects_show_their_colour_at_their_centre(scenes: list[Scene]) -> None:
    """Labels, layout and pixels agree: a full shape has its colour where its centre is."""
    checked = 0
    for scene in scenes[:80]:
        pixels = scene.pixels().astype(int)
        for item in scene.objects:
            row, col = patch_of(item.x, item.y)
            assert scene.labels[FIELD_INDEX["centre"], row, col] == 1
            assert scene.labels[FIELD_INDEX["shape"], row, col] == SHAPE_INDEX[item.shape]
            assert scene.labels[FIELD_INDEX["color"], row, col] == COLOR_INDEX[item.color]
            if item.shape in ("circle", "square", "cross", "star"):
                found = pixels[round(item.y), round(item.x)]
                distance = {c: np.abs(found - v).sum() for c, v in COLORS.items()}
                assert min(distance, key=lambda c: distance[c]) == item.color
                checked += 1
    assert checked > 50


def test_every_character_is_labelled_at_its_place(scenes: list[Scene]) -> None:
    for scene in scenes[:120]:
        for text in scene.prints:
            for k, glyph in enumerate(text.glyphs):
                across = round(glyph.width / PATCH_SIZE)
                first = glyph.width / 2 - PATCH_SIZE / 2
                row, col = patch_of(glyph.x - first, glyph.y - first)
                block = scene.labels[:, row : row + across, col : col + across]
                assert block.shape[1:] == (across, across)
                assert (block[FIELD_INDEX["char"]] == CHAR_INDEX[glyph.char]).all()
                assert (block[FIELD_INDEX["index"]] == 1 + k).all()
                assert (block[FIELD_INDEX["role"]] == ROLE_INDEX[text.role]).all()
                assert (block[FIELD_INDEX["last"]] == (k == len(text.text) - 1)).all()
                assert block[FIELD_INDEX["centre"]].sum() == block[FIELD_INDEX["centre"], 0, 0] == 1


def test_objects_keep_apart_and_cover_less_than_half(scenes: list[Scene]) -> None:
    for scene in scenes:
        for k, a in enumerate(scene.objects):
            for b in scene.objects[:k]:
                assert np.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius
        if scene.kind != "document":
            assert (scene.labels[FIELD_INDEX["role"]] > 0).mean() < 0.5


def _answer(scene: Scene, question: Question) -> str:
    """The answer by reading the layout, written without a look at how questions are composed."""
    words = question.question.rstrip("?").split()
    nouns = {f"{s}s" if not s.endswith("s") else f"{s}es": s for s in SHAPES}

    def fits(item: object, names: list[str]) -> bool:
        return all(getattr(item, "color" if n in COLORS else "shape") == n for n in names)

    def named(part: list[str]) -> list[str]:
        return [nouns.get(w, w) for w in part if nouns.get(w, w) in (*COLORS, *SHAPES)]

    if words[0] == "Is" and words[1] == "there":
        return "yes" if any(fits(o, named(words)) for o in scene.objects) else "no"
    if words[0] == "Is":
        cut = words.index("left") if "left" in words else words.index("above")
        (a,) = [o for o in scene.objects if fits(o, named(words[:cut]))]
        (b,) = [o for o in scene.objects if fits(o, named(words[cut:]))]
        return "yes" if (a.x < b.x if words[cut] == "left" else a.y < b.y) else "no"
    if words[:2] == ["How", "many"]:
        return str(sum(fits(o, named(words)) for o in scene.objects))
    if words[0] == "Where":
        (item,) = [o for o in scene.objects if fits(o, named(words))]
        return REGIONS[int(item.y // 112) * 3 + int(item.x // 112)]
    if words[0] == "Which":
        place = " ".join(words[5:])
        (item,) = [
            o for o in scene.objects if REGIONS[int(o.y // 112) * 3 + int(o.x // 112)] == place
        ]
        return f"{item.color} {item.shape}"
    if words[:2] in (["What", "color"], ["What", "shape"]):
        (item,) = [o for o in scene.objects if fits(o, named(words[3:]))]
        return item.color if words[1] == "color" else item.shape
    if "value" in words:
        (text,) = [p for p in scene.prints if p.role == "value" and p.key == words[-1]]
        return text.text
    role = "number" if "number" in words else "word"
    texts = [p for p in scene.prints if p.role == role]
    if "shown" not in words:
        texts = [p for p in texts if p.color in words]
    (text,) = texts
    return text.text


def test_answers_are_true_and_the_only_ones(scenes: list[Scene]) -> None:
    kinds: Counter[str] = Counter()
    for scene in scenes:
        for question in scene.questions:
            assert _answer(scene, question) == question.answer, question
            kinds[question.type] += 1
    assert set(kinds) == set(TYPES)
    assert min(kinds.values()) > 80


def test_evidence_is_where_the_answer_stands(scenes: list[Scene]) -> None:
    """The boxes of a question hold what it is about, and nothing where there is nothing."""
    seen: Counter[str] = Counter()
    for scene in scenes[:200]:
        for question in scene.questions:
            boxes = question.evidence
            seen[question.type] += 1
            inside = [
                next(o for o in scene.objects if abs(o.x - x) < 1e-6 and abs(o.y - y) < 1e-6)
                for x, y in (((a + c) / 2, (b + d) / 2) for a, b, c, d in boxes)
                if question.type not in ("digits", "word", "document")
            ]
            words = question.question[:-1].split()
            named = {w for w in words if w in COLORS or w in SHAPES}
            if question.type == "existence":
                assert bool(boxes) == (question.answer == "yes")
                assert all(named <= {o.color, o.shape} for o in inside)
            elif question.type == "count":
                assert len(boxes) == int(question.answer)
            elif question.type == "attribute":
                (item,) = inside
                assert question.answer in (item.color, item.shape)
            elif question.type == "relation":
                first, second = inside
                assert question.question.index(f"{first.color} {first.shape}") < (
                    question.question.index(f"{second.color} {second.shape}")
                )
            elif question.type == "position":
                (item,) = inside
                assert question.answer in (f"{item.color} {item.shape}", REGIONS[item.region])
            else:
                text = next(p for p in scene.prints if p.boxes == boxes)
                assert text.text == question.answer
    assert set(seen) == set(TYPES)


def test_guessing_does_not_pay(scenes: list[Scene]) -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for scene in scenes:
        for question in scene.questions:
            answers[question.type][question.answer] += 1
    most = {k: max(c.values()) / sum(c.values()) for k, c in answers.items()}
    assert most["existence"] == most["relation"] == 0.5
    assert most["attribute"] < 0.15
    assert most["position"] < 0.15
    assert most["count"] < 0.5
    assert max(most["digits"], most["word"], most["document"]) < 0.1


def test_the_suite_is_balanced_and_cached(tmp_path: Path) -> None:
    questions = [q for q, _ in scene_questions(48)]
    kinds = Counter(q.type for q in questions)
    assert set(kinds.values()) == {6}
    assert len({q.id for q in questions}) == 48
    assert Counter(q.answer for q in questions if q.type == "existence") == {"yes": 3, "no": 3}

    import pyarrow.parquet as pq

    path = build_task("vtc_scenes", tmp_path, limit=16)
    written = path.stat().st_mtime_ns
    assert build_task("vtc_scenes", tmp_path, limit=16) == path
    assert path.stat().st_mtime_ns == written
    assert build_task("vtc_scenes", tmp_path, limit=16, seed=1) != path
    table = pq.read_table(path)
    assert table.column_names == ["id", "image", "question", "answer", "type"]
    assert table.num_rows == 16
    assert table["image"][0].as_py()["bytes"].startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.tmp"))


def test_without_the_photos_the_reason_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VTC_DATA", str(tmp_path))
    assert data_folder() is None
    with pytest.raises(FileNotFoundError, match="VTC_DATA"):
        build_task("vtc_mosaic", tmp_path)


@pytest.mark.skipif(data_folder() is None, reason="the photo suite is not here")
def test_training_questions_use_no_dev_photo() -> None:
    folder = require_data_folder()
    train = {row["image"] for row in read_rows(folder / "photos_train.jsonl")}
    for name in ("photo", "mosaic", "multi", "clip"):
        for row in read_rows(folder / f"{name}_dev.jsonl"):
            used = row.get("images") or row.get("grid") or row.get("frames")
            assert not train & set(used)
    question, pictures = next(dev_rows("mosaic"))
    assert pictures[0].size == (336, 336)
    assert question.id == "mosaic_dev_0"
