# SPDX-License-Identifier: Apache-2.0
"""LLaVA with towers other than CLIP and SigLIP: a tower is read by what its attention module is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as hf

import vtc
from tests.reference.families import (
    IMAGE,
    OneGrid,
    Piece,
    cells,
    long,
    marks,
    pixels,
    text_settings,
    vision_settings,
)
from tests.reference.probes import Probe
from tests.runtime.test_tower_signals import watched
from vtc.core import Selection, VisionTokens
from vtc.models import UnsupportedModelError, find

SMALL = vision_settings(28)
TOWERS: dict[str, tuple[Callable[[], Any], str, int, bool]] = {
    "dinov2": (lambda: hf.Dinov2Config(**SMALL, mlp_ratio=2), "default", 16, True),
    "registers": (
        lambda: hf.Dinov2WithRegistersConfig(**SMALL, mlp_ratio=2, num_register_tokens=4),
        "default",
        20,
        True,
    ),
    "dinov3": (lambda: hf.DINOv3ViTConfig(**SMALL, num_register_tokens=4), "default", 20, True),
    "vit": (lambda: hf.ViTConfig(**SMALL), "default", 16, True),
    "vit with cls": (lambda: hf.ViTConfig(**SMALL), "full", 17, True),
    "deit": (lambda: hf.DeiTConfig(**SMALL), "default", 17, True),
    "beit": (
        lambda: hf.BeitConfig(**SMALL, use_relative_position_bias=True, layer_scale_init_value=0.5),
        "default",
        16,
        True,
    ),
    "mlcd": (
        lambda: hf.MLCDVisionConfig(**SMALL, num_key_value_groups=1),
        "default",
        16,
        True,
    ),
    "internvl": (
        lambda: hf.InternVLVisionConfig(**SMALL | {"image_size": [28, 28], "patch_size": [7, 7]}),
        "default",
        16,
        True,
    ),
    "aimv2": (lambda: hf.Aimv2VisionConfig(**SMALL, use_head=False), "full", 16, False),
    "siglip2": (
        lambda: hf.Siglip2VisionConfig(
            **{k: v for k, v in SMALL.items() if k != "image_size"},
            num_patches=16,
            vision_use_head=False,
        ),
        "full",
        16,
        False,
    ),
}
"""By tower: its config, how features are selected, tokens per image, and whether it has [CLS]."""
REFUSED = {
    "swin": (
        lambda: hf.SwinConfig(
            image_size=32, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4
        ),
        "its layers form several stages",
    ),
    "convnext": (
        lambda: hf.ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2, hidden_size=8),
        "none of its layers attends through the attention functions",
    ),
    "timm": (
        lambda: hf.TimmWrapperConfig(
            architecture="vit_tiny_patch16_224", do_pooling=False, hidden_size=192
        ),
        "none of its layers attends through the attention functions",
    ),
}


class Other(OneGrid):
    """LLaVA with another tower."""

    model_type = "llava"
    model_class = "LlavaForConditionalGeneration"

    def __init__(self, name: str) -> None:
        self.name = f"llava with {name}"
        if name in REFUSED:
            self.vision, self.strategy, self.count, self.cls = REFUSED[name][0], "full", 16, False
        else:
            self.vision, self.strategy, self.count, self.cls = TOWERS[name]

    def config(self) -> Any:
        return hf.LlavaConfig(
            vision_config=self.vision(),
            text_config=hf.LlamaConfig(**text_settings()),
            image_token_index=IMAGE,
            vision_feature_layer=-2,
            vision_feature_select_strategy=self.strategy,
        )

    def image(self, which: int, generator: torch.Generator, count: int) -> Piece:
        tokens = [*marks(*self.before, kind="text"), *cells(1, self.count)]
        if "siglip2" not in self.name:
            return Piece(tokens, {"pixel_values": pixels(generator, 1, 3, 28, 28)})
        rows, columns = ((4, 4), (3, 4), (2, 8))[which]
        mask = (torch.arange(16) < rows * columns).long()[None]
        extras = {
            "pixel_values": pixels(generator, 1, 16, 3 * 7 * 7) * mask[..., None],
            "pixel_attention_mask": mask,
            "spatial_shapes": long(rows, columns),
        }
        return Piece(tokens, extras)


@dataclass(frozen=True)
class Asks(Probe):
    """Keeps all, and notes what it is shown."""

    needs = frozenset({"cls_attention", "keys", "cls_query", "encoder"})
    vision_layer: int = -2

    def select(self, tokens: VisionTokens) -> Selection:
        SHOWN.append(tokens)
        return Selection(torch.arange(len(tokens)))


SHOWN: list[VisionTokens] = []


@pytest.mark.filterwarnings("ignore:.*not a family that vtc is tested on")
@pytest.mark.parametrize("generic", [False, True], ids=["llava", "generic"])
@pytest.mark.parametrize("layout", ["one", "images"])
@pytest.mark.parametrize("name", TOWERS)
def test_what_a_token_is_shown(
    name: str, layout: str, generic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = Other(name)
    model, batch = family.build("eager"), family.collate(family.rows(layout))
    if name == "beit":
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "relative_position_bias_table" in parameter_name:
                    parameter.normal_()
    if generic:
        monkeypatch.setattr(model.config, "model_type", "other")
    SHOWN.clear()
    with vtc.patch(model, Asks()), torch.no_grad():
        model(**batch)
    tower = find(model).tower_attention()
    own = watched(tower, monkeypatch)
    kept: list[Any] = []
    handle = model.model.vision_tower.register_forward_hook(lambda m, a, out: kept.append(out))
    with torch.no_grad():
        out = model.model.get_image_features(
            **{k: v for k, v in batch.items() if k not in ("input_ids", "attention_mask")}
        )
    handle.remove()
    (state,) = kept
    features = out.pooler_output
    assert len(SHOWN) == len(features)
    states = state.hidden_states[-2]
    first = states.shape[1] - family.count
    module = tower[-2]
    for i, tokens in enumerate(SHOWN):
        assert torch.equal(tokens.features, features[i])
        assert (tokens.encoder - states[i, first:]).abs().max() < 1e-6
        keys = own.keys[id(module)][i].transpose(0, 1).flatten(1)
        assert (tokens.keys - keys[first:]).abs().max() < 1e-6
        weights = own.weights[id(module)][i].float().mean(0)
        real = weights.sum(0) > 0
        expected = weights[0] if family.cls else weights[real].mean(0)
        assert (tokens.cls_attention - expected[first:]).abs().max() < 1e-6
        if family.cls:
            query = own.queries[id(module)][i][:, 0].flatten()
            assert (tokens.cls_query - query).abs().max() < 1e-6
            assert (tokens.cls_key - keys[0]).abs().max() < 1e-6
            assert (tokens.encoder_cls - states[i, 0]).abs().max() < 1e-6
        else:
            assert tokens.cls_query is tokens.encoder_cls is None


@pytest.mark.parametrize(("which", "extent"), [(0, (4, 4)), (1, (1, 16)), (2, (2, 8))])
def test_places_of_images_that_are_not_square(which: int, extent: tuple[int, int]) -> None:
    """NaFlex: image 1 has four patches of padding, which have no place."""
    family = Other("siglip2")
    rows = family.rows("ragged")
    model, batch = family.build("sdpa"), family.collate([rows[which]])
    SHOWN.clear()
    with vtc.patch(model, Asks()), torch.no_grad():
        model(**batch)
    (tokens,) = SHOWN
    assert tuple((tokens.grid.max(0).values + 1)[1:].tolist()) == extent
    assert bool((tokens.cls_attention > 0).all()) == (which != 1)


@pytest.mark.parametrize("method", ["visionzip", "vispruner", "todre", "mmtok", "holov"])
@pytest.mark.parametrize("name", [n for n in TOWERS if n != "vit with cls"])
def test_methods_run(name: str, method: str) -> None:
    family = Other(name)
    batch = family.collate(family.rows("ragged"))
    with vtc.patch(family.build("sdpa"), method) as patch, torch.no_grad():
        assert patch.model(**batch).logits.isfinite().all()


@pytest.mark.parametrize("name", REFUSED)
def test_a_tower_that_cannot_be_read_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=REFUSED[name][1]):
        vtc.patch(Other(name).build("eager"), Asks())


def test_merging_in_a_tower_that_pads_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="merged patches would mix with padding"):
        vtc.patch(Other("siglip2").build("eager"), "tome")


def test_windows_are_refused() -> None:
    """One layer a stage: only the call shows that they attend in windows."""
    family = Other("swin")
    family.vision = lambda: hf.SwinConfig(
        image_size=28, patch_size=7, embed_dim=16, depths=[1], num_heads=[2], window_size=2
    )
    model, batch = family.build("eager"), family.collate(family.rows("one"))
    with (
        vtc.patch(model, Asks(vision_layer=0)),
        pytest.raises(UnsupportedModelError, match="reads one patch for each"),
    ):
        model(**batch)
