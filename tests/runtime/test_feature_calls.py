# SPDX-License-Identifier: Apache-2.0
"""`get_image_features` and its like under a patch: what each call may ask for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from tests.reference.families import FAMILIES
from tests.reference.models import build_model, collate, samples
from tests.runtime.test_exactness import TOLERANCE, difference
from tests.runtime.test_families import REFUSED, rows_of, shared
from tests.runtime.test_tile_cls import Looks
from vtc.core import Method

NAMES = [name for name, family in FAMILIES.items() if family.model_type not in REFUSED]
LISTED = ["clip+llama", *NAMES]


# ---- return_dict --------------------------------------------------------------------------------
def _encoding(name: str) -> tuple[Any, list[tuple[str, dict[str, Tensor]]]]:
    """A model, and the names of its functions that encode with what they take."""
    if name == "clip+llama":
        batch = collate(samples("one", "clip"))
        return build_model("clip", "llama"), [("image", {"pixel_values": batch["pixel_values"]})]
    family, found = FAMILIES[name], []
    for modality, kind, mark in (("image", "one", ""), ("video", "video", "video")):
        model = shared(name, family.attentions[-1])
        base = getattr(model, "model", model)
        if (modality == "video" and not family.has_video) or not hasattr(
            base, f"get_{modality}_features"
        ):
            continue
        row = rows_of(name, kind)[0]
        extras = {k: v for k, v in row.extras.items() if "token_type" not in k}
        if modality == "video" and not any(mark in key for key in extras):
            continue  # clips are images to this family
        found.append((modality, extras))
    return shared(name, family.attentions[-1]), found


@pytest.mark.parametrize("method", [vtc.Full(), vtc.DivPrune(keep=0.5)], ids=["full", "divprune"])
@pytest.mark.parametrize("name", LISTED)
def test_features_as_a_tuple(name: str, method: Method) -> None:
    """As the plain model gives them, from the model and from its base, asked for in the call or
    in the config."""
    model, calls = _encoding(name)
    base = model.model if hasattr(model, "model") else model
    for modality, given in calls:
        for owner in (model, base):
            encode = f"get_{modality}_features"
            if not hasattr(owner, encode):
                continue
            with torch.no_grad():
                plain = getattr(owner, encode)(**given, return_dict=False)
                with vtc.patch(model, method):
                    found = getattr(owner, encode)(**given, return_dict=False)
                    kept = getattr(owner, encode)(**given, return_dict=None)
                    assert not isinstance(kept, tuple)
            assert isinstance(found, tuple)
            # The first run of a shape in a process may round otherwise than those after it.
            torch.testing.assert_close(found, plain, rtol=0, atol=1e-5)


def test_features_as_a_tuple_by_the_config() -> None:
    model = build_model("clip", "llama")
    pixels = collate(samples("one", "clip"))["pixel_values"]
    model.config.return_dict = False
    with torch.no_grad():
        plain = model.model.get_image_features(pixels)
        with vtc.patch(model, vtc.DivPrune(keep=9)):
            found = model.model.get_image_features(pixels)
    assert isinstance(found, tuple)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-5)


# ---- layers and strategies of a call ------------------------------------------------------------
@torch.no_grad()
def _logits(model: Any, **given: Any) -> Tensor:
    batch = collate(samples("ragged", "clip"))
    if given.get("vision_feature_select_strategy") == "full":  # [CLS] is a token as well
        rows = []
        for row in batch["input_ids"]:
            first = int(row.eq(2).nonzero()[0])
            rows.append(torch.cat([row[:first], torch.tensor([2]), row[first:]]))
        ids = torch.stack(rows)
        batch |= {"input_ids": ids, "attention_mask": (ids != 0).long()}
    return model(**batch, **given).logits


READERS: list[Method] = [
    vtc.ToDRE(keep=9, second_stage=False),
    vtc.VisionZip(keep=9),
    vtc.PruMerge(),
    vtc.SCOPE(keep=9),
    vtc.VisPruner(keep=9),
    vtc.ToMe(keep=20),
    vtc.FlowCut(keep=9),
    vtc.FastV(keep=9, layer=2),
]


@pytest.mark.parametrize(
    "given",
    [
        {"vision_feature_layer": -3},
        {"vision_feature_layer": 1},
        {"vision_feature_layer": -1},
        {"vision_feature_select_strategy": "full"},
    ],
    ids=str,
)
@pytest.mark.parametrize("method", READERS, ids=lambda method: method.name)
def test_a_call_is_as_a_model_with_such_a_config(method: Method, given: dict[str, Any]) -> None:
    model, other = build_model("clip", "llama"), build_model("clip", "llama")
    for name, value in given.items():
        setattr(other.config, name, value)
    if "vision_feature_select_strategy" in given and "encoder" in method.stages:
        with pytest.raises(vtc.UnsupportedModelError, match=r"'full'.*accepted is 'default'"):
            vtc.patch(other, method)
        with vtc.patch(model, method):
            expected = _logits(model)
            with pytest.raises(vtc.UnsupportedModelError, match=r"'full'.*accepted is 'default'"):
                _logits(model, **given)
            assert torch.equal(_logits(model), expected)
        return
    with vtc.patch(other, method):
        expected = _logits(other, **given)
    with vtc.patch(model, method):
        default = _logits(model)
        found = _logits(model, **given)
        assert torch.equal(_logits(model), default)
    assert torch.equal(found, expected)
    # A method that drops [CLS] as a token may keep the same others.
    if "vision_feature_layer" in given:
        assert difference(found[:, -1], default[:, -1]) > 1e-3


@pytest.mark.parametrize("method", [vtc.ToMe(keep=9), vtc.FlowCut(keep=9)], ids=["tome", "flowcut"])
def test_a_call_of_another_layer_in_the_middle_of_the_tower(method: Method) -> None:
    """Each merges in the layers of its own."""
    model = build_model("clip", "llama")
    found: list[Tensor] = []
    busy: list[bool] = []

    def ask(*_: Any) -> None:
        if not busy:
            busy.append(True)
            found.append(_logits(model, vision_feature_layer=-1))

    with vtc.patch(model, method):
        alone, around = _logits(model, vision_feature_layer=-1), _logits(model)
        assert difference(alone, around) > 1e-3
        layer = model.model.vision_tower.encoder.layers[0]
        handle = layer.layer_norm1.register_forward_pre_hook(ask)
        try:
            within = _logits(model)
        finally:
            handle.remove()
    assert len(found) == 1
    assert torch.equal(found[0], alone)
    assert torch.equal(within, around)


def test_fewer_pixels_have_no_place_for_cls() -> None:
    """Refused at patching where the config says so, else by the call that does."""
    method, model, other = vtc.Downsample(keep=9, how="pixels"), *(build_model() for _ in range(2))
    full = {"vision_feature_select_strategy": "full"}
    other.config.vision_feature_select_strategy = "full"
    with pytest.raises(vtc.UnsupportedModelError, match=r"include \[CLS\].*how='grid'"):
        vtc.patch(other, method)
    with vtc.patch(model, method):
        expected = _logits(model)
        with pytest.raises(vtc.UnsupportedModelError, match=r"include \[CLS\].*how='grid'"):
            _logits(model, **full)
        assert torch.equal(_logits(model), expected)


# ---- towers of clips ----------------------------------------------------------------------------
CLIPS = ["llava_next_video", "llava_onevision", "video_llava"]


@pytest.mark.parametrize("method", [*READERS[:2], vtc.PruMerge(), vtc.VisPruner(keep=9)], ids=str)
@pytest.mark.parametrize("name", CLIPS)
def test_methods_that_read_the_tower_run_on_clips(name: str, method: Method) -> None:
    """And give a row in a batch what they give it alone."""
    family, model = FAMILIES[name], shared(name, "sdpa")
    rows = rows_of(name, "video")
    with torch.no_grad(), vtc.patch(model, method) as patch:
        together = model(**family.collate(rows)).logits
        clips = [image for sample in patch.report.samples for image in sample.images]
        assert all(clip.per_layer[0] < clip.original for clip in clips)
        alone = [model(**family.collate([row])).logits[0] for row in rows]
    mask = family.collate(rows)["attention_mask"].bool()
    for i, single in enumerate(alone):
        assert difference(together[i][mask[i]], single) < TOLERANCE


@pytest.mark.parametrize("name", CLIPS)
def test_each_token_of_a_clip_is_shown_its_own_patches(name: str) -> None:
    """Attention, keys and patch states against the tower's own, frame by frame."""
    family, model = FAMILIES[name], FAMILIES[name].build("eager")
    config: Any = model.config  # type: ignore[attr-defined]
    row = family.rows("video")[0]
    looks, seen = Looks(), {}
    tower: Any = model.get_submodule(
        f"model.{'video' if name == 'video_llava' else 'vision'}_tower"
    )
    modules = dict(tower.named_modules())
    last = max(k for k in modules if k.endswith("self_attn"))
    cls = name != "llava_onevision"
    handles = [
        modules[last].register_forward_hook(lambda m, a, out: seen.update(attention=out[1])),
        modules[f"{last}.k_proj"].register_forward_hook(lambda m, a, out: seen.update(keys=out)),
        tower.register_forward_hook(
            lambda m, a, out: seen.update(states=out.hidden_states[config.vision_feature_layer])
        ),
    ]
    with torch.no_grad():
        model(**family.collate([row]))  # plain: what the tower holds
        for handle in handles:
            handle.remove()
        with vtc.patch(model, looks):
            model(**family.collate([row]))
    (tokens,) = looks.notes
    weights = seen["attention"].mean(1)  # (frames, t, t)
    paid = weights[:, 0, 1:] if cls else weights.mean(1)
    keys, states = (seen[k][:, 1:] if cls else seen[k] for k in ("keys", "states"))
    assert tokens.cls_query is None
    assert tokens.encoder_cls is None
    side = int(paid.shape[1] ** 0.5)

    def pooled(values: Tensor) -> Tensor:  # (frames, n, d) to what the tokens stand for
        grid = values.transpose(1, 2).unflatten(2, (side, side))
        if name == "llava_next_video":
            grid = torch.nn.functional.avg_pool2d(grid, 2)
        elif name == "llava_onevision":  # two rows and two columns around the middle of each
            low = [0, 1]
            rows = (grid[:, :, low] + grid[:, :, [i + 1 for i in low]]) / 2
            grid = (rows[..., low] + rows[..., [i + 1 for i in low]]) / 2
        return grid.flatten(2).transpose(1, 2).flatten(0, 1)

    close = torch.testing.assert_close
    close(tokens.cls_attention, pooled(paid[..., None])[:, 0], rtol=1e-4, atol=1e-6)
    close(tokens.keys, pooled(keys), rtol=1e-4, atol=1e-5)
    close(tokens.encoder, pooled(states), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "method", [vtc.ToMe(keep=20), vtc.FlowCut(keep=9)], ids=["tome", "flowcut"]
)
def test_a_call_of_a_lower_layer_in_the_middle_of_the_tower(method: Method) -> None:
    """The outer call goes on in layers that the inner one has not."""
    model = build_model("clip", "llama")
    found: list[Tensor] = []
    busy: list[bool] = []

    def ask(*_: Any) -> None:
        if not busy:
            busy.append(True)
            found.append(_logits(model, vision_feature_layer=1))

    with vtc.patch(model, method):
        alone, around = _logits(model, vision_feature_layer=1), _logits(model)
        assert difference(alone, around) > 1e-3
        layer = model.model.vision_tower.encoder.layers[0]
        handle = layer.layer_norm1.register_forward_pre_hook(ask)
        try:
            within = _logits(model)
        finally:
            handle.remove()
    assert len(found) == 1
    assert torch.equal(found[0], alone)
    assert torch.equal(within, around)


@pytest.mark.parametrize("method", [vtc.HoloV(keep=3), vtc.ToDRE(keep=0.4)], ids=["holov", "todre"])
@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen2_5_vl"])
def test_generate_encodes_clips_whose_tower_is_read(name: str, method: Method) -> None:
    """`generate` may encode before its first forward, and some encode clips as images."""
    family, model = FAMILIES[name], FAMILIES[name].build("sdpa")
    if name == "qwen3_5" and method.name == "todre":
        method = vtc.ToDRE(keep=0.4, second_stage=False)
    batch = family.collate([family.rows("video")[0]])
    with vtc.patch(model, method), torch.no_grad():
        expected = model(**batch).logits[0, -1].argmax()
        found = model.generate(**batch, max_new_tokens=1, do_sample=False)
    assert int(found[0, -1]) == int(expected)
