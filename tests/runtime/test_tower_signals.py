# SPDX-License-Identifier: Apache-2.0
"""Attention and keys of towers, as a method is shown them, against the tower's own eager attention.

Which patches a token joins is found by gradients through the model's own code.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

import vtc
from tests.reference.families import FAMILIES
from tests.reference.probes import Probe
from tests.runtime.test_families import rows_of, shared, skip_reason
from tests.runtime.test_tower_states import HERE, LAST, RESAMPLED, uses_by_gradient
from vtc.core import Selection, VisionTokens
from vtc.core.prefill import Stopwatch
from vtc.models import find
from vtc.runtime.hf import taps

CLS = {"llama4": -1, "internvl": 0, "qianfan_ocr": 0, "perception_lm": 0}
"""The place of [CLS], in towers that have one."""

INSIDE: dict[str, Callable[[Any], Any]] = dict.fromkeys(
    ("muse_glimmer", "muse_spark"), lambda base: base.vision_tower.layers[-1]
)
"""The module whose output are the last states in the order in which attention sees them, where that
of `LAST` are in another."""


@dataclass(frozen=True)
class Asks(Probe):
    """Keeps all, and notes what it is shown."""

    needs = frozenset({"cls_attention", "keys", "cls_query", "low_attention"})
    vision_layer = -1
    low_layer = 0

    def select(self, tokens: VisionTokens) -> Selection:
        SHOWN.append(tokens)
        return Selection(torch.arange(len(tokens)))


SHOWN: list[VisionTokens] = []


@dataclass(frozen=True)
class AsksStates(Asks):
    """The same of what the projector receives."""

    needs = frozenset({"encoder"})


@dataclass
class Own:
    """What a tower's attention modules compute, by module, one entry for each row of a batch."""

    weights: dict[int, list[Tensor]] = field(default_factory=dict)
    keys: dict[int, list[Tensor]] = field(default_factory=dict)
    queries: dict[int, list[Tensor]] = field(default_factory=dict)

    def received(self, module: Any, cls: int | None) -> Tensor:
        """(all tokens of all rows,) the [CLS] row, or the mean over the patches that see each."""
        found = []
        for weights in self.weights[id(module)]:
            mean = weights.float().mean(0)
            real = mean.sum(0) > 0  # padding is seen by none
            if cls is not None:
                found.append(mean[cls])
            else:
                seers = (mean[real] > 1e-12).sum(0).clamp_min(1)
                found.append(mean[real].sum(0) / seers)
        return torch.cat(found)


def watched(tower: list[Any], monkeypatch: pytest.MonkeyPatch) -> Own:
    """Note what the eager attention functions in the file of a tower's modules are given and
    return."""
    own, file = Own(), sys.modules[type(tower[-1]).__module__]

    def noting(attend: Callable[..., Any]) -> Callable[..., Any]:
        def run(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
            output, weights = attend(module, query, key, *args, **kwargs)
            for store, found in ((own.weights, weights), (own.keys, key), (own.queries, query)):
                store.setdefault(id(module), []).extend(found.detach())
            return output, weights

        return run

    if not hasattr(file, "eager_attention_forward"):  # of timm
        attend = torch.nn.functional.scaled_dot_product_attention
        current: list[Any] = [None]

        def explicit(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
            weights = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
            found = noting(lambda *args: (attend(query, key, value, **kwargs), weights))
            return found(current[0], query, key)[0]

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", explicit)
        for layer in tower:

            def run(*args: Any, layer: Any = layer, inner: Any = layer.forward, **kw: Any) -> Any:
                current[0] = layer
                return inner(*args, **kw)

            monkeypatch.setattr(layer, "forward", run)
    for name in dir(file):
        if name.endswith("eager_attention_forward"):
            monkeypatch.setattr(file, name, noting(getattr(file, name)))
    return own


def joined_by_gradient(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """(joined patches, patches) bool: of which patches the tower of MiniCPM-V makes each of those
    that its later layers have."""
    seen: list[Tensor] = []
    merger = model.model.vision_tower.vit_merger
    handle = merger.register_forward_hook(lambda m, args, out: seen.extend((args[0], out)))
    model(**batch)
    handle.remove()
    patches, joined = seen
    grads = [torch.autograd.grad(own.sum(), patches, retain_graph=True)[0][0] for own in joined[0]]
    return torch.stack(grads).abs().sum(2) > 0


@pytest.mark.parametrize("kind", ["one", "images", "video"])
@pytest.mark.parametrize("name", [name for name in HERE if name not in RESAMPLED])
def test_what_a_token_is_shown(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES[name]
    if (reason := skip_reason(name, kind, "eager", "forward")) is not None:
        pytest.skip(reason)
    model, batch = shared(name, "eager"), family.collate(rows_of(name, kind))
    SHOWN.clear()
    with vtc.patch(model, Asks()), torch.no_grad():
        model(**batch)
    tower = find(model).tower_attention()
    first, last = tower[0], tower[-1]
    own = watched(tower, monkeypatch)
    if name in INSIDE:
        monkeypatch.setitem(LAST, name, INSIDE[name])
    used = uses_by_gradient(name, model, batch)
    assert len(used) == sum(len(tokens) for tokens in SHOWN)
    cls = CLS.get(name)
    low, high = (own.received(module, cls) for module in (first, last))
    keys = torch.cat([k.transpose(0, 1).flatten(1) for k in own.keys[id(last)]])
    assert len(used[0]) == len(keys)
    early = joined_by_gradient(model, batch) if name == "minicpmv4_6" else None
    expected = [
        torch.cat(
            [
                low[u if early is None else early[u].any(0)].mean(0, keepdim=True),
                *(s[u].mean(0).reshape(-1) for s in (high, keys)),
            ]
        )
        for u in used
    ]
    wanted = torch.stack(expected)
    found = torch.cat(
        [
            torch.cat([t.low_attention[:, None], t.cls_attention[:, None], t.keys], dim=1)
            for t in SHOWN
        ]
    )
    # Tiles are joined in another order than they are made in, and clips are made after images.
    if name not in ("internvl", "qianfan_ocr") and kind != "video":
        assert (found - wanted).abs().max() < 1e-5
        assert (found - wanted)[:, :2].abs().max() < 1e-6
    assert torch.cdist(found.double(), wanted.double()).min(1).values.max() < 1e-5
    for tokens in SHOWN:
        assert (tokens.cls_query is None) == (tokens.cls_key is None)
        assert kind == "video" or (tokens.cls_key is None) == (cls is None)
        if tokens.cls_key is not None:
            queries, of_cls = (
                torch.stack([row[:, cls].flatten() for row in store[id(last)]])
                for store in (own.queries, own.keys)
            )
            assert (queries - tokens.cls_query).abs().max(1).values.min() < 1e-5
            assert (of_cls - tokens.cls_key).abs().max(1).values.min() < 1e-5


ATTENTION: dict[str, Callable[[Any], list[Any]]] = {
    **dict.fromkeys(
        ("blip_2", "instructblip", "instructblipvideo"),
        lambda base: [layer.attention.attention for layer in base.qformer.encoder.layer],
    ),
    "idefics2": lambda base: [
        layer.self_attn for layer in base.connector.perceiver_resampler.layers
    ],
    "deepseek_ocr2": lambda base: [
        layer.self_attn for layer in base.vision_tower.vision_encoder.layers
    ],
}
"""Of resamplers, the modules in which queries attend to one another."""


def shown_in(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """(tokens, 2 + d) low attention, attention and keys of all tokens, as methods see them."""
    SHOWN.clear()
    with vtc.patch(model, Asks()), torch.no_grad():
        model(**batch)
    assert all(tokens.cls_query is None and tokens.cls_key is None for tokens in SHOWN)
    parts = [torch.stack([t.low_attention, t.cls_attention], dim=1) for t in SHOWN]
    return torch.cat([torch.cat(parts), torch.cat([t.keys for t in SHOWN])], dim=1)


@pytest.mark.parametrize("kind", ["one", "images", "ragged", "video"])
@pytest.mark.parametrize("name", [name for name in RESAMPLED if name in HERE])
def test_what_a_token_of_a_resampler_is_shown(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its row is found by gradients; what it receives is added up query by query."""
    if (reason := skip_reason(name, kind, "eager", "forward")) is not None:
        pytest.skip(reason)
    model, batch = shared(name, "eager"), FAMILIES[name].collate(rows_of(name, kind))
    found = shown_in(model, batch)
    tower = ATTENTION[name](model.model if hasattr(model, "model") else model)
    own = watched(tower, monkeypatch)
    used = torch.stack(uses_by_gradient(name, model, batch))
    assert bool((used.sum(1) == 1).all())  # each token has one row
    # The batches of the resampler follow one another; a row may hold text or patches as well.
    places, first = {}, 0
    for b, weights in enumerate(own.weights[id(tower[-1])]):
        for row in range(weights.shape[1]):
            places[first + row] = b, row
        first += weights.shape[1]
    assert first == used.shape[1]
    rows = [places[at] for at in used.int().argmax(1).tolist()]
    expected = []
    for b, row in rows:
        signals = []
        for module in (tower[0], tower[-1]):
            weights = own.weights[id(module)][b].double().mean(0)
            column = row + weights.shape[1] - weights.shape[0]
            paid = [float(weights[r, column]) for other, r in rows if other == b]
            signals.append(sum(paid) / sum(one > 0 for one in paid))
        keys = own.keys[id(tower[-1])][b][:, column].flatten()
        expected.append(torch.cat([torch.tensor(signals), keys]))
    assert found.shape == (len(rows), len(expected[0]))
    away = (found - torch.stack(expected)).abs()
    assert away[:, :2].max() < 1e-6
    assert away.max() < 1e-5


@pytest.mark.skipif("granite4_vision" not in FAMILIES, reason="this transformers is too old for it")
@pytest.mark.parametrize("kind", ["one", "ragged"])
def test_a_token_of_a_windowed_resampler_is_shown_the_patches_at_its_place(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a Q-Former that returns its queries, a token depends on these patches only."""
    name = "granite4_vision"
    model, batch = shared(name, "eager"), FAMILIES[name].collate(rows_of(name, kind))
    found = shown_in(model, batch)
    SHOWN.clear()
    with vtc.patch(model, AsksStates()), torch.no_grad():
        model(**batch)
    states = torch.cat([tokens.encoder for tokens in SHOWN])
    first = model.model.layerwise_projectors[1]  # features of this one enter layer 0
    given: list[Tensor] = []
    made: list[Any] = []
    handles = [first.register_forward_pre_hook(lambda m, args: given.append(args[0]))]
    encode = model.model.get_image_features

    def noting(*args: Any, **kwargs: Any) -> Any:
        out = encode(*args, **kwargs)
        made.append(dict(out.deepstack_features)[0])
        return out

    tower = [layer.self_attn for layer in model.model.vision_tower.encoder.layers]
    own = watched(tower, monkeypatch)
    monkeypatch.setattr(model.model, "get_image_features", noting, raising=False)
    monkeypatch.setattr(
        type(first.qformer),
        "forward",
        lambda self, query_embeds, **kwargs: BaseModelOutput(last_hidden_state=query_embeds),
    )
    model(**batch)
    for handle in handles:
        handle.remove()
    (patches,), (features,) = given, made
    used = []
    for token in torch.cat(list(features)):
        grad = torch.autograd.grad(token.sum(), patches, retain_graph=True, allow_unused=True)[0]
        if grad is not None and bool(grad.any()):
            used.append(grad.flatten(0, 1).abs().sum(1) > 0)
    assert {int(at.sum()) for at in used} == {4}
    assert len(used) == len(found)
    low, high = (own.received(module, None) for module in (tower[0], tower[-1]))
    keys = torch.cat([k.transpose(0, 1).flatten(1) for k in own.keys[id(tower[-1])]])
    every = torch.cat([low[:, None], high[:, None], keys], dim=1)
    expected = torch.stack([every[at].mean(0) for at in used])
    assert (found - expected).abs().max() < 1e-5
    of_patches = patches.detach().flatten(0, 1)
    truth = torch.stack([of_patches[at].mean(0) for at in used])
    assert (states - truth).abs().max() < 1e-5


def test_images_packed_for_flash_attention_are_apart() -> None:
    """Flash attention is told where they end, and has no mask."""
    query, key = torch.randn(2, 1, 4, 9, 8, generator=torch.Generator().manual_seed(0))
    module = find(shared("kimi_k25", "eager")).tower_attention()[0]
    packed, apart = taps.Tap(module), taps.Tap(module)
    for tap in (packed, apart):
        taps.listen_tower(tap, None, Stopwatch())
        assert tap.armed is not None
    ends = torch.tensor([0, 4, 9])
    packed.hear(query, key, key, None, {"cu_seq_lens_q": ends})
    for part in (slice(0, 4), slice(4, 9)):
        apart.hear(query[:, :, part], key[:, :, part], key[:, :, part], None, {})
    for a, b in zip(packed.captured, apart.captured, strict=True):
        assert torch.equal(a.attention, b.attention)
        assert torch.equal(a.keys, b.keys)
