# SPDX-License-Identifier: Apache-2.0
"""The encoder stage in every tower: patches merged or dropped, tile by tile.

The reference runs the family's own code with nothing removed: an attention function masks the keys
of patches that are gone, all patches of a merged group take its mean before the feed-forward, and
at the end patches without a token become NaN, so that the family's own code shows which tokens
they make. It shares no code with the runner; methods decide on what the reference shows them.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.modeling_utils import AttentionInterface

import vtc
from tests.reference.families import FAMILIES, Unsupported, draw_weights
from tests.reference.probes import Probe
from tests.runtime.test_exactness import difference
from tests.runtime.test_families import rows_of, skip_reason
from vtc.core import EncoderState, Merging, Method, Positions, Selection, VisionTokens

DEPTH = 4
UNITS: dict[str, int] = {
    **dict.fromkeys(("vipllava", "paligemma", "llava_next", "llava_next_video"), 1),
    **dict.fromkeys(("llava_onevision", "video_llava", "deepseek_vl"), 1),
    **dict.fromkeys(("internvl", "aya_vision", "aya_vision_short", "cohere2_vision"), 2),
    **dict.fromkeys(("idefics3", "smolvlm", "gemma3", "gemma3_short", "mistral3"), 2),
    **dict.fromkeys(("qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5"), 2),
    **dict.fromkeys(("glm4v", "glm4v_moe", "glm46v"), 2),
}
"""Patches along the side of a token."""
PACKED = (
    *("mistral3", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5"),
    *("glm4v", "glm4v_moe", "glm46v"),
)
HERE = [name for name in UNITS if name in FAMILIES]
KINDS = ("one", "ragged", "images", "video")


# ---- methods ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Mixed(Probe):
    """Merges what is alike in pairs and drops what is attended to least, other numbers in each
    tile, by all that it is shown."""

    weighs: bool = True
    positions: Positions = "contiguous"

    @property
    def weighs_sizes(self) -> bool:  # type: ignore[override]
        return self.weighs

    def merge(self, state: EncoderState) -> Merging | None:
        n = len(state)
        if n < 3 or state.layer == 1:
            return None
        score = state.attention + 0.1 * state.keys[:, 0, 0].tanh() + 0.05 * state.size
        score = score + 0.1 * state.values[:, -1, 0].tanh()
        if state.cls_value is not None:
            score = score + 0.1 * (state.values[:, 0] @ state.cls_value[0]).tanh()
        if state.memory is not None:
            score = score + 0.1 * state.memory
        order = score.argsort(descending=True)
        gone = 1 + int(score[0] > score.mean())
        target = torch.full((n,), -1)
        left = order[: n - gone]
        # The last two of what is left become one, listed in another order than they came.
        groups = [*left[:-2].tolist(), left[-2:].tolist()]
        memory = torch.zeros(len(groups))
        for number, members in enumerate(groups):
            target[members] = number
            memory[number] = score[members].mean()
        return Merging(target, memory)


METHODS: dict[str, Method] = {
    "mixed": Mixed(),
    "mixed-plain": Mixed(weighs=False),
    "tome": vtc.ToMe(keep=0.5),
    "flowcut": vtc.FlowCut(keep=0.4),
}


@dataclass(frozen=True)
class Given(Probe):
    """Sequence stage: keeps the tokens whose features are no NaN."""

    positions: Positions = "contiguous"

    def select(self, tokens: VisionTokens) -> Selection:
        return Selection((~tokens.features.isnan().any(1)).nonzero()[:, 0])


# ---- models -------------------------------------------------------------------------------------
@cache
def build(name: str) -> Any:
    family, depth = FAMILIES[name], DEPTH
    config = family.config()
    vision = config.vision_config
    setattr(vision, "depth" if hasattr(vision, "depth") else "num_hidden_layers", depth)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        cls = getattr(transformers, family.model_class)
        attention = family.attentions[-1]
        model = cls._from_config(config, attn_implementation=attention, dtype=torch.float32)
    draw_weights(model, 0, family.never)
    return model.eval()


@cache
def untouched(name: str) -> Any:
    return copy.deepcopy(build(name))


def base_of(model: Any) -> Any:
    return model.model if hasattr(model, "model") else model


def towers_of(model: Any) -> list[Any]:
    names = ("vision_tower", "vision_model", "visual", "image_tower", "video_tower")
    return [getattr(base_of(model), n) for n in names if getattr(base_of(model), n, None)]


def parts_of(tower: Any) -> list[tuple[Any, Any, Any]]:
    """(layer, attention, second norm) of each layer."""
    if hasattr(tower, "blocks"):
        layers = tower.blocks
    else:
        inner = tower.transformer if hasattr(tower, "transformer") else tower.encoder
        layers = inner.layers if hasattr(inner, "layers") else inner.layer
    first = lambda layer, *names: next(  # noqa: E731
        getattr(layer, name) for name in names if hasattr(layer, name)
    )
    return [
        (
            layer,
            first(layer, "self_attn", "attention", "attn"),
            first(layer, "layer_norm2", "layernorm_after", "ffn_norm", "norm2"),
        )
        for layer in layers
    ]


# ---- the reference ------------------------------------------------------------------------------
@dataclass
class Group:
    """Units that became one token."""

    units: list[int]

    @property
    def first(self) -> int:
        return min(self.units)


@dataclass
class TileTruth:
    """A tile: its row and the places of its tokens, [CLS] apart, and what became of its units."""

    row: int
    cls: int | None
    loose: list[int]
    units: list[list[int]]
    groups: list[Group]
    memory: Tensor | None = None


class Reference:
    """Runs a family's own tower with nothing removed."""

    def __init__(self, name: str, model: Any, method: Method, kind: str) -> None:
        self.name, self.model, self.method, self.kind = name, model, method, kind
        self.tiles: list[TileTruth] = []
        self.chunk = 0
        self.handles: list[Any] = []
        self.at: dict[int, int] = {}
        self.counts: list[list[int]] = []
        config = model.config
        wanted = getattr(config, "vision_feature_layer", -1)
        wanted = [wanted] if isinstance(wanted, int) else wanted
        self.used = max(range(DEPTH + 1)[layer] for layer in wanted)

    @contextmanager
    def running(self, given: dict[str, Any]) -> Iterator[None]:
        global CURRENT
        self.given, before = given, {}
        for tower in towers_of(self.model):
            for i, (layer, attention, norm) in enumerate(parts_of(tower)):
                self.at[id(attention)] = i
                before[attention] = attention.config
                attention.config = copy.copy(attention.config)
                attention.config._attn_implementation_internal = "vtc_reference"
                self.handles.append(norm.register_forward_pre_hook(self.mean(i)))
                if i == self.used - 1:
                    hook = layer.register_forward_hook(self.mark, prepend=True)
                    self.handles.append(hook)
        CURRENT = self
        try:
            yield
        finally:
            CURRENT = None
            for handle in self.handles:
                handle.remove()
            for attention, config in before.items():
                attention.config = config

    # ---- tiles
    def raster(self, rows: int, columns: int, first: int) -> tuple[list[list[int]], list[int]]:
        by = UNITS[self.name]
        if self.name == "llava_next_video" and self.kind == "video":
            by = self.model.config.spatial_pool_stride
        place = lambda r, c: first + r * columns + c  # noqa: E731
        units = [
            [place(r + i, c + j) for i in range(by) for j in range(by)]
            for r in range(0, rows - by + 1, by)
            for c in range(0, columns - by + 1, by)
        ]
        inside = {p for unit in units for p in unit}
        return units, [p for p in range(first, first + rows * columns) if p not in inside]

    def start(self, rows: int, length: int) -> None:
        self.tiles, first = [], 0
        if "mistral3" in self.name:
            patch = self.model.config.vision_config.patch_size
            for height, width in self.given["image_sizes"].tolist():
                units, loose = self.raster(height // patch, width // patch, first)
                self.tiles.append(TileTruth(0, None, loose, units, []))
                first += height // patch * (width // patch)
        elif self.name in PACKED:
            for t, h, w in self.given[f"{self.kind_of}_grid_thw"].tolist():
                for _ in range(t):
                    units = [list(range(p, p + 4)) for p in range(first, first + h * w, 4)]
                    self.tiles.append(TileTruth(0, None, [], units, []))
                    first += h * w
        else:
            side = math.isqrt(length)
            cls = length - side * side
            for row in range(rows):
                units, loose = self.raster(side, side, cls)
                self.tiles.append(TileTruth(row, 0 if cls else None, loose, units, []))
        for tile in self.tiles:
            tile.groups = [Group([u]) for u in range(len(tile.units))]
        self.counts = [[] for _ in self.tiles]

    @property
    def kind_of(self) -> str:
        return "video" if "pixel_values_videos" in self.given else "image"

    # ---- attention
    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float
    ) -> Tensor:
        i = self.at[id(module)]
        chunked = self.name in PACKED and self.name != "mistral3"
        if i == 0 and (self.chunk == 0 or not chunked):
            total = int(self.given_length()) if chunked else q.shape[2]
            self.start(q.shape[0], total)
        logits = (q @ k.transpose(-1, -2)).float() * scaling
        if mask is not None:
            logits = logits + (
                mask if mask.dtype != torch.bool else torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
            )
        tiles = [self.tiles[self.chunk]] if chunked else self.tiles
        shift = tiles[0].units[0][0] if chunked else 0
        for tile in tiles:
            seen = torch.full((q.shape[2],), -math.inf)
            fixed = [*([] if tile.cls is None else [tile.cls]), *tile.loose]
            seen[[p - shift for p in fixed]] = 0.0
            for group in tile.groups:
                weight = math.log(len(group.units)) if self.method.weighs_sizes else 0.0
                seen[[p - shift for p in tile.units[group.first]]] = weight
            if self.name == "mistral3":  # one sequence: only the tile's own rows
                own = [*tile.loose, *(p for unit in tile.units for p in unit)]
                logits[tile.row][:, own] += seen
            else:
                logits[tile.row] += seen
        p = logits.softmax(-1)
        if i < self.used:
            for tile in tiles:
                self.decide(i, tile, shift, p[tile.row], k[tile.row], v[tile.row])
        if chunked:
            self.chunk = (self.chunk + 1) % len(self.tiles)
        return (p.to(v.dtype) @ v).transpose(1, 2).contiguous()

    def given_length(self) -> int:
        return int(self.given[f"{self.kind_of}_grid_thw"].prod(1).sum())

    def decide(self, i: int, tile: TileTruth, shift: int, p: Tensor, k: Tensor, v: Tensor) -> None:
        number = next(n for n, other in enumerate(self.tiles) if other is tile)
        places = [[at - shift for at in tile.units[group.first]] for group in tile.groups]
        flat = [at for own in places for at in own]
        loose = [at - shift for at in tile.loose]
        self.counts[number].append(len(flat) + len(loose))
        queries = [tile.cls] if tile.cls is not None else [*flat, *loose]
        received = p[:, queries].mean(0).mean(0)
        state = EncoderState(
            layer=i,
            num_layers=self.used,
            original=len(tile.units),
            has_cls=tile.cls is not None,
            attention=torch.stack([received[own].mean() for own in places]),
            keys=torch.stack([k[:, own].mean(1) for own in places]),
            values=torch.stack([v[:, own].mean(1) for own in places]),
            cls_value=None if tile.cls is None else v[:, tile.cls],
            size=torch.tensor([float(len(group.units)) for group in tile.groups]),
            memory=tile.memory,
        )
        self.old = getattr(self, "old", {})
        self.old[number] = tile.groups
        merging = self.method.merge(state)
        if merging is not None:
            groups = []
            for token in range(int(merging.target.max()) + 1):
                members = (merging.target == token).nonzero()[:, 0].tolist()
                groups.append(Group([u for m in members for u in tile.groups[m].units]))
            tile.groups, tile.memory = groups, merging.memory
        if i == self.used - 1:
            self.counts[number].append(len(tile.groups) * len(tile.units[0]) + len(loose))

    # ---- states
    def mean(self, i: int) -> Callable[..., None]:
        def hook(module: Any, args: Any) -> None:
            if i >= self.used:
                return
            hidden = args[0] if args[0].dim() == 3 else args[0][None]
            for number, tile in enumerate(self.tiles):
                old = {group.first: group for group in self.old[number]}
                for group in tile.groups:
                    # The tokens before, each as often as it stood for units.
                    members = [first for first in old if first in group.units]
                    if len(members) == 1:
                        if members[0] == group.first:
                            continue
                    total = sum(len(old[m].units) for m in members)
                    for j in range(len(tile.units[0])):
                        contents = sum(
                            hidden[tile.row, tile.units[m][j]] * len(old[m].units) for m in members
                        )
                        hidden[tile.row, tile.units[group.first][j]] = contents / total

        return hook

    def mark(self, module: Any, args: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        states = states.clone()
        rows = states if states.dim() == 3 else states[None]
        for tile in self.tiles:
            left = {group.first for group in tile.groups}
            for unit, places in enumerate(tile.units):
                if unit not in left:
                    rows[tile.row, places] = math.nan
        return (states, *output[1:]) if isinstance(output, tuple) else states


CURRENT: Reference | None = None


def _reference_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    assert CURRENT is not None
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    return CURRENT.attend(module, query, key, value, attention_mask, scaling), None


AttentionInterface.register("vtc_reference", _reference_attention)


def encode_calls(model: Any, batch: dict[str, Tensor]) -> list[tuple[str, dict[str, Any], Any]]:
    """The calls that the model's forward makes to encode images and clips, and their outputs."""
    base, calls = base_of(model), []

    def noting(kind: str) -> Any:
        original = getattr(base, f"get_{kind}_features")

        def run(*args: Any, **kwargs: Any) -> Any:
            out = original(*args, **kwargs)
            names = [n for n in inspect.signature(original).parameters]
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            given.pop("return_dict", None)
            calls.append((kind, given, out.pooler_output))
            return out

        return run

    names = [k for k in ("image", "video") if hasattr(base, f"get_{k}_features")]
    for kind in names:
        setattr(base, f"get_{kind}_features", noting(kind))
    try:
        with torch.no_grad():
            model(**batch)
    finally:
        for kind in names:
            delattr(base, f"get_{kind}_features")
    return calls


def reference_features(
    name: str, method: Method, kind: str, given: dict[str, Any]
) -> tuple[list[Tensor], Reference]:
    model = untouched(name)
    truth = Reference(name, model, method, kind)
    with truth.running(given), torch.no_grad():
        out = getattr(base_of(model), f"get_{kind}_features")(**given, return_dict=True)
    return [own.reshape(-1, own.shape[-1]) for own in out.pooler_output], truth


def usable(name: str, kind: str) -> None:
    attention = FAMILIES[name].attentions[-1]
    if (reason := skip_reason(name, kind, attention, "forward")) is not None:
        pytest.skip(reason)
    if (name, kind) in (("llava_onevision", "video"),):
        pytest.skip("refused")


# ---- tests --------------------------------------------------------------------------------------
WORST: dict[str, float] = {}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", HERE)
def test_features_are_those_of_a_tower_in_which_patches_are_masked(
    name: str, kind: str, method: str
) -> None:
    usable(name, kind)
    batch = FAMILIES[name].collate(rows_of(name, kind))
    model = build(name)
    for modality, given, plain in encode_calls(untouched(name), batch):
        expected, truth = reference_features(name, METHODS[method], modality, given)
        with vtc.patch(model, METHODS[method]), torch.no_grad():
            call = getattr(base_of(model), f"get_{modality}_features")
            found = call(**given, return_dict=True).pooler_output
        assert len(found) == len(expected)
        missing = 0
        for own, true, whole in zip(found, expected, plain, strict=True):
            own, whole = own.reshape(-1, own.shape[-1]), whole.reshape(-1, whole.shape[-1])
            gone = true.isnan().any(1)
            missing += int(gone.sum())
            assert bool((own[gone] == 0).all())
            away = difference(own[~gone], true[~gone])
            WORST[name] = max(WORST.get(name, 0.0), away)
            assert away < 2e-4
            assert difference(whole[~gone], true[~gone]) > 1e-3
        assert missing > 0


# ---- in the whole model -------------------------------------------------------------------------
def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", ["mixed", "flowcut"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", HERE)
def test_logits_are_those_of_a_selection_of_the_reference_s_tokens(
    name: str, kind: str, method: str
) -> None:
    """The sequence stage, which has a reference of its own, keeps the tokens that the reference
    makes, and gives them its features."""
    usable(name, kind)
    family, model = FAMILIES[name], build(name)
    batch = family.collate(rows_of(name, kind))
    calls = encode_calls(untouched(name), batch)
    whole: dict[str, list[Tensor]] = {}
    for modality, given, _ in calls:
        expected, _ = reference_features(name, METHODS[method], modality, given)
        whole[modality] = expected
    given = Given(positions=METHODS[method].positions)
    with vtc.patch(model, given) as patch, shown(model, whole):
        expected_logits = logits_of(model, batch)
        kept = [image.steps[0][1] for sample in patch.report.samples for image in sample.images]
    with vtc.patch(model, METHODS[method]) as patch:
        found = logits_of(model, batch)
        images = [image for sample in patch.report.samples for image in sample.images]
    real = batch["attention_mask"].bool()
    assert [image.encoded for image in images] == kept
    assert [image.per_layer[0] for image in images] == kept
    assert difference(found[real], expected_logits[real]) < 5e-4
    for side in ("left", "right"):
        together = family.collate(rows_of(name, kind), side)
        with vtc.patch(model, METHODS[method]):
            found = logits_of(model, together)
            for i, row in enumerate(rows_of(name, kind)):
                alone = logits_of(model, family.collate([row]))[0]
                assert difference(found[i, together["attention_mask"][i].bool()], alone) < 5e-4


@contextmanager
def shown(model: Any, whole: dict[str, list[Tensor]]) -> Iterator[None]:
    """The features that the model encodes are those of `whole`, NaN where no token is."""
    base = base_of(model)
    before = {}
    for kind, features in whole.items():
        before[kind] = original = getattr(base, f"get_{kind}_features")

        def run(*args: Any, original: Any = original, features: Any = features, **kwargs: Any) -> Any:
            out = original(*args, **kwargs)
            for own, true in zip(out.pooler_output, features, strict=True):
                own.copy_(true.view(own.shape))
            return out

        setattr(base, f"get_{kind}_features", run)
    try:
        yield
    finally:
        for kind, original in before.items():
            setattr(base, f"get_{kind}_features", original)
