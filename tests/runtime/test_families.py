# SPDX-License-Identifier: Apache-2.0
"""The matrix of the design, for every family of transformers that vtc supports.

Tiny models of `tests.reference.families` run patched, the way a user would run them, and are held
to `tests/reference/masked.py`, in which nothing is removed. All families meet all batches, in all
ways of decoding, eager and sdpa by turns; a ninth of these cells runs unmarked.
"""

from __future__ import annotations

import copy
import itertools
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from torch.nn.functional import softmax
from transformers import CONFIG_MAPPING

import vtc
from tests.conftest import Recorder
from tests.reference.families import FAMILIES, SINCE, Row, TinyFamily, Unsupported
from tests.reference.masked import NO_PLACES, UNUSED_AXES, Masked, images_of
from tests.reference.probes import Fixed, Probe, Ragged, Spy
from tests.reference.reference import token_loss
from tests.runtime.test_exactness import (
    ANSWER,
    CONTROL,
    NEW,
    TOLERANCE,
    assert_greedy,
    difference,
    generate,
    steps_of,
)
from vtc.cli.support import table
from vtc.core import LayerState, Method, Positions, Record, Rows, Selection, VisionTokens
from vtc.models import families
from vtc.models.page import page


# ---- probes -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Blend(Probe):
    """Sequence stage: reads all that no tower is needed for, and gives new contents."""

    positions: Positions = "original"
    needs = frozenset({"text", "segment"})

    def select(self, tokens: VisionTokens) -> Selection:
        assert tokens.text is not None
        assert tokens.segment is not None
        n = len(tokens)
        score = tokens.features[:, 1]
        if tokens.grid is not None:
            score = score + 0.01 * (tokens.grid * torch.tensor([5, 3, 1])).sum(1)
        if tokens.crop is not None:
            score = score + 0.1 * tokens.crop
        chosen = score.topk(max(1, n // 3 + tokens.image % 2)).indices.sort().values
        hint = tokens.text.mean(0) if len(tokens.text) else 0.0
        if len(tokens.segment):
            hint = hint + tokens.segment[0]
        return Selection(
            chosen, 0.7 * tokens.features[chosen] + 0.2 * tokens.features.mean(0) + 0.1 * hint
        )


@dataclass(frozen=True)
class Steps(Probe):
    """Layers stage: reads attention of layers that ran and, unless it is `plain`, of the one about
    to run and what goes through layers; drops twice, rewrites what stays. With `attends`, only
    those layers have attention."""

    first: int = 2
    second: int = 5
    positions: Positions = "original"
    plain: bool = False
    attends: tuple[int, ...] = ()

    def prune_layers(self, num_layers: int) -> tuple[int, ...]:
        return (self.first, self.second)

    def taps(self, num_layers: int) -> dict[int, Rows]:
        rows: dict[int, Rows] = {0: "vision_text", self.first - 1: "last", self.second - 1: "text"}
        if not self.attends:
            return rows
        return {layer: rows.get(layer, "last") for layer in self.attends if layer < self.second}

    def peeks(self, num_layers: int) -> dict[int, Rows]:
        rows: dict[int, Rows] = {} if self.plain else {self.first: "text", self.second: "last"}
        return {k: row for k, row in rows.items() if not self.attends or k in self.attends}

    def records(self, num_layers: int) -> dict[int, frozenset[Record]]:
        if self.plain:
            return {}
        return {
            0: frozenset({"input", "attention_in", "attention_out"}),
            min(self.first - 1, 1): frozenset({"mlp_in", "mlp_out"}),
            self.second - 1: frozenset({"output", "normed"}),
        }

    def prune(self, state: LayerState) -> Selection | None:
        vision = state.vision
        score = state.attention[max(state.attention)].sum(0)[vision]
        assert (state.ahead is None) == (state.layer not in self.peeks(state.num_layers))
        if state.ahead is not None:
            score = score + state.ahead.sum(0)[vision]
        for kept in state.recorded.values():
            score = score + 0.01 * kept[vision].mean(1).tanh()
        score = score + state.attention[min(state.attention)].sum(0)[vision] / len(vision)
        score = score + 0.001 * state.grid[vision].sum(1)
        count = len(vision) - len(vision) // (2 + int((score[0] > score.mean()).item()))
        chosen = score.topk(count).indices.sort().values
        if state.layer == self.first:
            return Selection(chosen)
        contents = state.hidden[vision]
        return Selection(chosen, 0.8 * contents[chosen] + 0.2 * contents.mean(0))


RECURRENT = {
    *("qwen3_5", "qwen3_5_moe", "minicpmv4_6", "minicpmv4_7", "minicpm_ocr"),
    *("lfm2_vl", "lfm3_vl", "nemotron_h_omni"),
}
"""Families of which only layers 2 and 5 attend."""
COUNT_PADDING = {"exaone4_5", "hyperclovax_vision_v2"}
"""In `generate` their models number all tokens, padding included."""
AXES = {"hunyuan_vl": 4}
"""Axes of positions, where there are not three."""
PLAIN = {"exaone4_5", "blip-2"}
"""Families of which not all can be read between layers; what cannot is refused."""
REFUSED = {"mllama"}
"""Not here: mllama has tests/runtime/test_mllama.py."""
NESTED = {"blip-2", "instructblip", "instructblipvideo"}
"""Their forward and their `generate` need pixels; further turns are those of their language model
(`test_nested.py`)."""
OLD = Version(transformers.__version__) < Version("5.21")
NOW = 9
"""One in so many cells runs unmarked."""
PROBES: dict[str, Callable[[TinyFamily], Method | None]] = {
    "ragged": lambda family: Ragged(),
    "ragged-contiguous": lambda family: Ragged(positions="contiguous"),
    "blend": lambda family: Blend(),
    "blend-contiguous|fixed": lambda family: (
        Blend(positions="contiguous") | Fixed(stride=2, positions="contiguous")
    ),
    "layers": lambda family: _layers(family, "original"),
    "layers-contiguous": lambda family: _layers(family, "contiguous"),
    "ragged|layers": lambda family: Ragged(positions="contiguous") | _layers(family, "contiguous"),
    "divprune": lambda family: vtc.DivPrune(keep=0.4),
    "split@tile": lambda family: _split(family, vtc.PerTile),
    "split@frame": lambda family: _split(family, vtc.PerFrame),
    "fastv": lambda family: vtc.FastV(keep=0.5, layer=first_cut(family)),
}
GLM = ("glm4v", "glm4v_moe", "glm46v", "glmga", "glm_ocr")
KINDS = ("one", "ragged", "images", "mixed", "video")
MODES = (
    "forward",
    "greedy",
    "beam",
    "sampling",
    "no_cache",
    "static_cache",
    "second_turn",
    "second_generate",
    "labels",
)


def _early(family: TinyFamily) -> bool:
    """Whether late layers reuse the keys of the third, after which nothing can be dropped."""
    return family.model_type == "gemma3n" or "device" in family.name


def _layers(family: TinyFamily, positions: Positions) -> Method:
    first, second = first_cut(family), 2 if _early(family) else 5
    attends = (2, 5) if family.model_type in RECURRENT else ()
    return Steps(first, second, positions, family.model_type in PLAIN, attends)


def first_cut(family: TinyFamily) -> int:
    """The first layer before which FastV can act."""
    return 1 if _early(family) else 3 if family.model_type in RECURRENT else 2


def _split(family: TinyFamily, wrap: Any) -> Method | None:
    """Both stages where the family has them, if it has tiles or clips."""
    kind = "images" if wrap is vtc.PerTile else "video"
    try:
        images = [image for row in family.rows(kind) for image in images_of(family, row)]
    except Unsupported:
        return None
    parts = [i.crop if wrap is vtc.PerTile else tuple(g[0] for g in i.grid) for i in images]
    if not any(part and len({*part}) > 1 for part in parts):
        return None
    plain = family.model_type in RECURRENT or _early(family)  # no room for the method's two cuts
    inner = vtc.DivPrune(keep=0.4) if plain else vtc.CATP(keep=0.4, layer=3)
    return wrap(inner)  # type: ignore[no-any-return]


# ---- shared -------------------------------------------------------------------------------------
@cache
def shared(name: str, attention: str) -> Any:
    return FAMILIES[name].build(attention)


@cache
def pristine(name: str) -> Any:
    """For the reference: never patched."""
    return FAMILIES[name].build("eager")


@cache
def rows_of(name: str, kind: str) -> tuple[Row, ...]:
    return FAMILIES[name].rows(kind)


@cache
def truths(name: str, probe: str, kind: str, scored: bool = False) -> tuple[Masked, ...]:
    family = FAMILIES[name]
    model, method = pristine(name), PROBES[probe](family)
    return tuple(
        Masked(family, model, method, row, len(row.input_ids) - (ANSWER if scored else 0))
        for row in rows_of(name, kind)
    )


@cache
def plain(name: str, kind: str) -> tuple[torch.Tensor, ...]:
    """The logits of each row with nothing dropped, in a batch of its own."""
    family, model = FAMILIES[name], pristine(name)
    return tuple(Masked(family, model, None, row).logits()[0] for row in rows_of(name, kind))


@cache
def distance(name: str, probe: str, kind: str) -> float:
    """How far the plain model is away at the end of the prompt: the furthest row of the batch."""
    found, every = (
        [],
        zip(rows_of(name, kind), truths(name, probe, kind), plain(name, kind), strict=True),
    )
    for row, truth, uncompressed in every:
        away = difference(truth.logits()[0][-1], uncompressed[-1])
        if row.images:
            found.append(away)
        else:
            assert away < TOLERANCE
    return max(found)


def here() -> list[str]:
    return [name for name, family in FAMILIES.items() if family.model_type not in REFUSED]


def skip_reason(name: str, kind: str, attention: str, mode: str) -> str | None:
    """Why transformers itself has no such cell, without a patch."""
    family = FAMILIES[name]
    if attention not in family.attentions:
        return f"{name} has no {attention} attention"
    try:
        family.rows(kind)
    except Unsupported as error:
        return str(error)
    if family.model_type in NESTED and mode.startswith("second"):
        return f"{name} takes no further turn without pixels"
    if kind in family.unstable:
        return f"{name}: a row of {kind} has other logits in a batch, unpatched"
    if OLD and (family.model_type[:7], mode) == ("qwen3_5", "beam"):
        return "transformers 5.20 itself leaves this model's recurrent states with other beams"
    if mode == "beam" and (
        family.model_type == "llama4"
        or (name in (*GLM, "nemotron_h_omni") and kind in ("video", "images"))
        or (family.model_type, kind)
        in (("granite4_vision", "images"), ("phi4_multimodal", "images"))
    ):
        return f"transformers itself cannot expand the features of {name} for beams"
    if OLD and kind == "video" and family.model_type in ("gemma4", "kimi_k25", "nemotron_h_omni"):
        return "transformers 5.20 itself fails with clips of this model, or batches of them"
    if OLD and (family.model_type, mode) == ("gemma4", "static_cache"):
        return "transformers 5.20 itself decodes otherwise from this model's static cache"
    if (name, mode) == ("ernie4_5_vl_moe", "no_cache"):
        return "transformers itself does not lengthen this model's types of tokens without a cache"
    if mode.startswith("second") and (name, kind) == ("qwen2_5_vl", "video"):
        return "transformers itself goes on at other positions after a clip in a further turn"
    return None


def _rarest(met: Counter[tuple[str, str]], choices: list[str], places: tuple[str, ...]) -> str:
    """The choice that has met fewest of the places, which it now meets."""
    found = min(choices, key=lambda choice: sorted(met[choice, at] for at in places))
    met.update((found, at) for at in places)
    return found


def cells() -> list[Any]:
    """Every family with every batch and way of decoding; probes and attentions take turns.

    Next is the probe that has met fewest of a cell's family, batch and way of decoding, so that
    what an old transformers cannot run leaves no pair without a cell; then the attention likewise.
    """
    found: list[Any] = []
    met: Counter[tuple[str, str]] = Counter()
    for name in here():
        fit = [probe for probe, made in PROBES.items() if made(FAMILIES[name]) is not None]
        for kind, mode in itertools.product(KINDS, MODES):
            probes = fit
            if (name, kind) == ("idefics2", "one"):
                # Its image has fewer tokens than those keep.
                probes = [probe for probe in fit if not probe.startswith("ragged")]
            attentions = [
                attention
                for attention in ("eager", "sdpa")
                if skip_reason(name, kind, attention, mode) is None
            ]
            if not attentions:
                continue
            probe = _rarest(met, probes, (name, kind, mode))
            attention = _rarest(met, attentions, (name, probe, kind, mode))
            marks = [] if len(found) % NOW == 0 else [pytest.mark.slow]
            values = (name, probe, kind, attention, mode)
            found.append(pytest.param(*values, marks=marks, id="-".join(values)))
    return found


# ---- running ------------------------------------------------------------------------------------
def run_forward(family: TinyFamily, model: Any, rows: tuple[Row, ...], expected: Any) -> float:
    worst = 0.0
    for side in ("left", "right"):
        batch = family.collate(rows, side)
        with torch.no_grad():
            logits = model(**batch).logits
        for i, truth in enumerate(expected):
            real = batch["attention_mask"][i].bool()
            worst = max(worst, difference(logits[i, real], truth.logits()[0]))
    return worst


def run_generate(
    family: TinyFamily, model: Any, rows: tuple[Row, ...], expected: Any, **settings: Any
) -> float:
    batch = family.collate(rows)
    if settings.get("do_sample"):  # a placeholder must not be drawn: its features are not there
        settings["suppress_tokens"] = list(family.never)
    output = generate(model, batch, **settings)
    width = batch["input_ids"].shape[1]
    produced, logits = output.sequences[:, width:], steps_of(output)
    steps = [t.step_logits(p[None])[0] for t, p in zip(expected, produced, strict=True)]
    if settings.get("do_sample"):
        torch.manual_seed(0)
        for step in range(NEW):
            found = torch.stack([s[step] for s in steps])
            found[:, list(family.never)] = -torch.inf
            chances = softmax(found, dim=-1)
            assert torch.equal(torch.multinomial(chances, 1)[:, 0], produced[:, step])
    else:
        assert_greedy(logits, produced)
    return max(difference(logits[i], found) for i, found in enumerate(steps))


def run_beam(family: TinyFamily, model: Any, rows: tuple[Row, ...], expected: Any) -> float:
    """The score of the best beam is that of its tokens in the reference."""
    batch = family.collate(rows)
    output = generate(model, batch, num_beams=3, output_scores=True)
    width, worst = batch["input_ids"].shape[1], 0.0
    for i, truth in enumerate(expected):
        tokens = output.sequences[i, width:]
        chances = truth.step_logits(tokens[None])[0].log_softmax(-1)
        score = float(chances.gather(1, tokens[:, None]).sum()) / NEW
        worst = max(worst, abs(float(output.sequences_scores[i]) - score))
    return worst


def axial(model: Any) -> bool:
    if model.config.model_type in UNUSED_AXES:
        return False
    return hasattr(getattr(model, "model", model), "rope_deltas")


def run_second_turn(family: TinyFamily, model: Any, rows: tuple[Row, ...], expected: Any) -> float:
    """Two more forwards on the cache of `generate`, with the new tokens only."""
    batch = family.collate(rows)
    first = generate(model, batch)
    width = batch["input_ids"].shape[1]
    past, sequences, mask = first.past_key_values, first.sequences, batch["attention_mask"]
    known, worst = width + NEW - 1, 0.0
    assert past.get_seq_length() == known
    for turn, count in enumerate((3, 1)):
        generator = torch.Generator().manual_seed(turn)
        words = torch.randint(24, family.words_end, (len(rows), count), generator=generator)
        sequences = torch.cat((sequences, words), dim=1)
        mask = nn.functional.pad(mask, (0, sequences.shape[1] - mask.shape[1]), value=1)
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, known:]
        if axial(model):
            deltas = model.model.rope_deltas
            positions = (positions + deltas)[None].expand(AXES.get(family.model_type, 3), -1, -1)
        elif family.model_type == "paligemma":
            positions = positions + 1
        elif family.model_type in COUNT_PADDING:
            positions = None
        with torch.no_grad():
            output = model(
                input_ids=sequences[:, known:],
                attention_mask=mask,
                past_key_values=past,
                position_ids=positions,
                use_cache=True,
            )
        for i, truth in enumerate(expected):
            answer = truth.logits(sequences[i : i + 1, width:])[0]
            fed = sequences.shape[1] - known
            worst = max(worst, difference(output.logits[i], answer[-fed:]))
        known = sequences.shape[1]
    return worst


def run_second_generate(
    family: TinyFamily, model: Any, rows: tuple[Row, ...], expected: Any
) -> float:
    """`generate` again, with all ids and a copy of the cache of the first turn."""
    batch = family.collate(rows)
    first = generate(model, batch)
    width = batch["input_ids"].shape[1]
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(24, family.words_end, (len(rows), 3), generator=generator)
    ids = torch.cat((first.sequences, words), dim=1)
    mask = nn.functional.pad(batch["attention_mask"], (0, ids.shape[1] - width), value=1)
    second = generate(
        model,
        {"input_ids": ids, "attention_mask": mask},
        past_key_values=copy.deepcopy(first.past_key_values),
    )
    logits, worst = steps_of(second), 0.0
    for i, truth in enumerate(expected):
        tail = second.sequences[i : i + 1, width:]
        worst = max(worst, difference(logits[i], truth.step_logits(tail)[0, -NEW:]))
    return worst


def run_labels(family: TinyFamily, model: Any, rows: tuple[Row, ...], expected: Any) -> float:
    batch = family.collate(rows, "right")
    from_end = batch["attention_mask"].flip(1).cumsum(1).flip(1)
    answer = (from_end <= ANSWER) & batch["attention_mask"].bool()
    labels = batch["input_ids"].masked_fill(~answer, -100)
    with torch.no_grad():
        output = model(**batch, labels=labels)
    worst, own = 0.0, []
    for i, truth in enumerate(expected):
        real = batch["attention_mask"][i].bool()
        own.append(labels[i, real])
        worst = max(worst, difference(output.logits[i, real], truth.logits()[0]))
    return max(worst, abs(float(output.loss) - token_loss(list(expected), own)))


def run(mode: str, model: Any, name: str, probe: str, kind: str) -> float:
    family, rows = FAMILIES[name], rows_of(name, kind)
    expected = truths(name, probe, kind, mode == "labels")
    runs: dict[str, Callable[..., float]] = {
        "forward": run_forward,
        "beam": run_beam,
        "second_turn": run_second_turn,
        "second_generate": run_second_generate,
        "labels": run_labels,
    }
    if mode in runs:
        return runs[mode](family, model, rows, expected)
    settings: dict[str, dict[str, Any]] = {
        "greedy": {},
        "sampling": {"do_sample": True, "top_k": 0, "temperature": 1.0},
        "no_cache": {"use_cache": False},
        "static_cache": {"cache_implementation": "static"},
    }
    return run_generate(family, model, rows, expected, **settings[mode])


@pytest.mark.filterwarnings("ignore:.*positions='contiguous' has no meaning")
@pytest.mark.parametrize(("name", "probe", "kind", "attention", "mode"), cells())
def test_cell(
    name: str, probe: str, kind: str, attention: str, mode: str, recorder: Recorder
) -> None:
    method = PROBES[probe](FAMILIES[name])
    assert method is not None
    with vtc.patch(shared(name, attention), method) as patch:
        found = run(mode, patch.model, name, probe, kind)
    control = distance(name, probe, kind)
    recorder.note(f"{name} {probe} {kind} {attention} {mode}", found, control)
    assert control > CONTROL
    assert found < TOLERANCE


def test_only_a_wish_to_close_gaps_is_warned_of_where_there_are_none() -> None:
    model = shared("qwen2_vl", "sdpa")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vtc.patch(model, "todre", keep=0.5).unpatch()
    with pytest.warns(UserWarning, match="positions='contiguous' has no meaning"):
        vtc.patch(model, "fastv", positions="contiguous").unpatch()


# ---- what methods are shown ---------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", here())
def test_methods_are_shown_places_and_tiles(name: str, kind: str) -> None:
    """Every image and clip with its own grid and tiles; newlines and frame marks are not shown."""
    family = FAMILIES[name]
    attention = family.attentions[-1]
    if (reason := skip_reason(name, kind, attention, "forward")) is not None:
        pytest.skip(reason)
    spy, rows = Spy(Fixed(stride=1)), rows_of(name, kind)
    with vtc.patch(shared(name, attention), spy) as patch, torch.no_grad():
        patch.model(**family.collate(rows))
    shown = [tokens for tokens, _ in spy.notes if isinstance(tokens, VisionTokens)]
    expected = [image for row in rows for image in images_of(family, row)]
    assert len(shown) == len(expected)
    for tokens, image in zip(shown, expected, strict=True):
        assert len(tokens) == tokens.original == len(image.grid)
        if family.model_type in NO_PLACES:
            assert tokens.grid is None
        else:
            assert tokens.grid.tolist() == [list(place) for place in image.grid]
        crop = None if tokens.crop is None else tuple(tokens.crop.tolist())
        assert crop == image.crop


def test_the_page_of_models_is_current() -> None:
    """As `vtc models --markdown > MODELS.md` makes it."""
    current = (Path(__file__).parents[2] / "MODELS.md").read_text("utf-8")
    if OLD:  # an older transformers lacks some families
        assert current.startswith(page("").partition("## Particularities")[0][:200])
    else:
        assert current == page(table())


def test_every_pair_of_the_matrix_occurs() -> None:
    """Probes and attentions take turns; no family, batch or way of decoding is left without one."""
    found = [param.values for param in cells()]
    both = {v[0] for v in found} & {n for n in here() if len(FAMILIES[n].attentions) == 2}
    for column in (0, 2, 4):
        for value in {values[column] for values in found}:
            met = {values[3] for values in found if values[column] == value}
            assert met == {"eager", "sdpa"} or (column == 0 and value not in both)
    for column in range(5):
        met = {(values[1], values[column]) for values in found}
        for value in {values[column] for values in found}:
            for probe, made in PROBES.items():
                if column == 1 or (column == 0 and made(FAMILIES[value]) is None):
                    continue
                assert (probe, value) in met


def test_every_supported_model_type_is_in_the_matrix() -> None:
    """The families of this file, test_exactness.py and test_seq2seq.py are all that is called
    tested."""
    here = {family.model_type for family in FAMILIES.values()} | {"llava", "florence2"}
    supported = {
        kind
        for cls in families()
        for kind in cls.model_types
        if kind in CONFIG_MAPPING and (not OLD or kind not in SINCE)
    }
    assert supported <= here
    assert here - supported <= REFUSED


def test_another_thread_that_encodes_leaves_a_forward_alone() -> None:
    """Features that a second thread asks for are not taken for those of a forward under way."""
    family, model = FAMILIES["paligemma"], shared("paligemma", "sdpa")
    batch, other = family.collate(rows_of("paligemma", "ragged")), rows_of("paligemma", "one")[0]
    method = vtc.VisionZip(keep=0.3)
    with vtc.patch(model, method), torch.no_grad():
        expected = model(**batch).logits
        stop = threading.Event()

        def encode() -> None:
            while not stop.is_set():
                model.get_image_features(other.extras["pixel_values"])

        thread = threading.Thread(target=encode)
        thread.start()
        try:
            for _ in range(20):
                assert difference(model(**batch).logits, expected) < TOLERANCE
        finally:
            stop.set()
            thread.join()


@pytest.mark.parametrize("name", ["llama4_short", "gemma3_short", "aya_vision_short", "qwen3_5"])
def test_padding_that_would_be_counted_is_refused(name: str) -> None:
    """In a further turn of unequal rows, a window, a chunk or a recurrent state counts padding."""
    family, model = FAMILIES[name], shared(name, "sdpa")
    batch = family.collate(rows_of(name, "ragged"))
    with vtc.patch(model, Ragged()) as patch:
        first = generate(patch.model, batch)
        past = first.past_key_values
        held = past.get_seq_length()
        words = torch.full((3, 4), 30)
        mask = nn.functional.pad(
            batch["attention_mask"], (0, held - batch["input_ids"].shape[1]), value=1
        )
        mask = torch.cat([mask, torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])], dim=1)
        with pytest.raises(ValueError, match="ragged continuation"), torch.no_grad():
            patch.model(input_ids=words, attention_mask=mask, past_key_values=past)


def test_a_tower_that_joins_patches_is_not_read_as_if_it_did_not() -> None:
    """The generic family assumes one patch a token, and refuses what shows another number."""
    family = FAMILIES["cohere2_vision"]
    model: Any = family.build("sdpa")
    model.config.model_type = "unknown"
    with (
        pytest.warns(UserWarning, match="Assumed"),
        vtc.patch(model, "todre", keep=0.3, second_stage=False),
        pytest.raises(vtc.UnsupportedModelError, match="one patch for each"),
    ):
        model(**family.collate(rows_of("cohere2_vision", "one")))
