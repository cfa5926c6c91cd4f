# SPDX-License-Identifier: Apache-2.0
"""Every method on every model type that takes it: one cell of the matrix each.

A padded batch of different rows runs patched, in one forward and in cached decoding, and is held to
the reference of `tests/reference/masked.py`. The reference decides itself, from what it computed,
unless the method reads the vision tower or keys: what methods are shown of these is compared in
tests of its own, and the reference repeats the choice.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch

import vtc
from tests.conftest import Recorder
from tests.reference.families import FAMILIES, Row
from tests.reference.masked import Masked, decoder_of
from tests.reference.probes import Spy
from tests.runtime.test_exactness import (
    CONTROL,
    TOLERANCE,
    assert_greedy,
    difference,
    generate,
    steps_of,
)
from tests.runtime.test_families import here, plain, pristine, rows_of, shared, skip_reason
from vtc.core import LayerState, Method, Selection, VisionTokens
from vtc.core.events import Event, Selected, Shown

SETTINGS: dict[str, dict[str, Any]] = {"tome": {"keep": 0.6}, "correlation": {"keep": 0.4}}
"""A tower of two layers cannot merge more, and its random keys are not redundant."""
TIES: dict[tuple[str, str], dict[str, Any]] = {
    ("qwen3_omni_moe_thinker", "cdpruner"): {"keep": 0.3},
    ("deepseek_ocr2", "todre"): {"positions": "original"},
}
"""At the default, two experts of a token are up to 4e-7 apart for the router, and rounding
decides."""


@dataclass(frozen=True)
class Replayed(Spy):
    """A method whose choices are known: by image, and by decoder layer."""

    chosen: dict[int, Selection] = field(default_factory=dict, compare=False)
    pruned: dict[int, Selection] = field(default_factory=dict, compare=False)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset()

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(
            {"encoder": "sequence", "pixels": "sequence"}.get(s, s) for s in super().stages
        )

    def records(self, num_layers: int) -> dict[int, Any]:
        return {}

    def select(self, tokens: VisionTokens) -> Selection:
        return self.chosen[tokens.image]

    def prune(self, state: LayerState) -> Selection | None:
        return self.pruned.get(state.layer)


@dataclass
class Heard:
    """What a patch reported, by sample: the choices by image and by layer, and deep features."""

    chosen: dict[int, dict[int, Selection]] = field(default_factory=lambda: defaultdict(dict))
    deep: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    pruned: dict[int, dict[int, Selection]] = field(default_factory=lambda: defaultdict(dict))

    def __call__(self, event: Event) -> None:
        if isinstance(event, Shown) and event.tokens.every_grid is not None:
            # What the tower made: which of the places have a token, and its contents.
            places = {tuple(place): i for i, place in enumerate(event.tokens.every_grid.tolist())}
            if event.tokens.every_crop is not None:
                crops = event.tokens.every_crop.tolist()
                every = zip(crops, event.tokens.every_grid.tolist(), strict=True)
                places = {(crop, *place): i for i, (crop, place) in enumerate(every)}
                kept = zip(event.tokens.crop.tolist(), event.tokens.grid.tolist(), strict=True)
                indices = [places[crop, *place] for crop, place in kept]
            else:
                indices = [places[tuple(place)] for place in event.tokens.grid.tolist()]
            made = Selection(torch.tensor(indices), event.tokens.features.clone())
            self.chosen[event.sample][event.tokens.image] = made
        elif isinstance(event, Selected) and event.layer is not None:
            self.pruned[event.sample][event.layer] = event.selection
        elif isinstance(event, Selected) and event.image is not None:
            self.chosen[event.sample][event.image] = event.selection

    def enter(self, decoder: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Keep the deep features that a changed tower made, by sample."""
        if kwargs.get("deepstack_visual_embeds") is not None and not self.deep:
            counts = kwargs["visual_pos_masks"].sum(1).tolist()
            parts = [every.split(counts) for every in kwargs["deepstack_visual_embeds"]]
            self.deep.update(enumerate(map(list, zip(*parts, strict=True))))

    def replayed(self, method: Method, sample: int) -> Method:
        return Replayed(method, chosen=self.chosen[sample], pruned=self.pruned[sample])


def decides_itself(method: Method, num_layers: int) -> bool:
    """Whether the reference knows all that the method reads."""
    records = {name for names in method.records(num_layers).values() for name in names}
    tower = method.needs - {"text", "segment"}
    return not (tower or records & {"keys", "rotary"} or {"encoder", "pixels"} & {*method.stages})


def names() -> list[str]:
    """One of each model type."""
    found: dict[str, str] = {}
    for name in here():
        found.setdefault(FAMILIES[name].model_type, name)
    return [*found.values()]


@cache
def taken(name: str) -> frozenset[str]:
    """The methods that the tiny model takes."""
    refused = vtc.refusals(shared(name, FAMILIES[name].attentions[-1]))
    return frozenset(method for method in vtc.methods() if method not in refused)


def kind_of(name: str) -> str:
    """The first batch that the model can run: rows of unequal length, if there are such."""
    attention = FAMILIES[name].attentions[-1]
    kinds = ("ragged", "images", "one", "video")
    return next(k for k in kinds if skip_reason(name, k, attention, "greedy") is None)


def run(name: str, method: Method) -> tuple[float, float]:
    """The largest difference to the reference, and that of the plain model to it."""
    family, kind = FAMILIES[name], kind_of(name)
    attention, rows, heard = family.attentions[-1], rows_of(name, kind), Heard()
    batch = family.collate(rows)
    with vtc.patch(shared(name, attention), method) as patch, patch.listen(heard), torch.no_grad():
        handle = decoder_of(patch.model).register_forward_pre_hook(
            heard.enter, with_kwargs=True, prepend=True
        )
        logits = patch.model(**batch).logits
        handle.remove()
        acting = patch.method
        output = generate(patch.model, batch)
    truths = [_truth(name, acting, row, i, heard) for i, row in enumerate(rows)]
    produced, steps = output.sequences[:, batch["input_ids"].shape[1] :], steps_of(output)
    assert_greedy(steps, produced)
    worst, away = 0.0, 0.0
    for i, truth in enumerate(truths):
        real = batch["attention_mask"][i].bool()
        answer = truth.logits(produced[i : i + 1])[0]
        length = len(rows[i].input_ids)
        worst = max(worst, difference(logits[i, real], answer[:length]))
        worst = max(worst, difference(steps[i], answer[length - 1 : -1]))
        away = max(away, difference(answer[length - 1], plain(name, kind)[i][-1]))
    return worst, away


def _truth(name: str, method: Method, row: Row, sample: int, heard: Heard) -> Masked:
    family, model, deep = FAMILIES[name], pristine(name), None
    if not decides_itself(method, len(decoder_of(model).layers)):
        method, deep = heard.replayed(method, sample), heard.deep.get(sample)
    return Masked(family, model, method, row, deep=deep)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", [name for name in vtc.methods() if name != "full"])
@pytest.mark.parametrize("name", names())
def test_pair(name: str, method: str, recorder: Recorder) -> None:
    if method not in taken(name):
        pytest.skip(f"{name} refuses {method}")
    settings = TIES.get((name, method), SETTINGS.get(method, {}))
    found, control = run(name, dataclasses.replace(vtc.methods()[method].example(), **settings))
    recorder.note(f"{name} {method}", found, control)
    assert control > CONTROL
    assert found < TOLERANCE
