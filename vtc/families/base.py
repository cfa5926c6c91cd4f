# SPDX-License-Identifier: Apache-2.0
"""How transformers lays out a family of VLMs, as far as the engine needs to know."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin


class UnsupportedModelError(TypeError):
    """The model is not a VLM of a shape that vtc covers."""


@dataclass(frozen=True)
class Backbone:
    """The modules of a VLM that the engine hooks.

    Attributes:
        model: what the user called `vtc.patch` on, without wrappers.
        base: merges vision features into the text embeddings (`get_placeholder_mask`).
        language_model: called by `base` with `inputs_embeds`.
        decoder: holds the decoder `layers` and their `config`.
        tower: the vision encoder, or `None` where it was not found.
    """

    model: Any
    base: Any
    language_model: Any
    decoder: Any
    tower: Any

    @property
    def layers(self) -> nn.ModuleList:
        return self.decoder.layers


class Family:
    """The common shape: projected features are scattered over placeholder tokens, and a causal
    decoder with one-dimensional positions runs on the result. Families override what differs."""

    name: ClassVar[str] = "generic"
    model_types: ClassVar[tuple[str, ...]] = ()
    stages: ClassVar[tuple[str, ...]] = ("pixels", "encoder", "sequence", "layers")

    # ---- where things are ---------------------------------------------------------------------
    def backbone(self, model: nn.Module) -> Backbone:
        """Find the modules, or raise `UnsupportedModelError` naming what is missing."""
        base: Any = (
            model if hasattr(model, "get_placeholder_mask") else getattr(model, "model", None)
        )
        missing = [
            name
            for name in ("get_placeholder_mask", "get_image_features", "language_model")
            if not hasattr(base, name)
        ]
        if base is None or missing:
            raise UnsupportedModelError(
                f"model: {type(model).__name__} lacks {', '.join(missing) or 'a base model'}"
            )
        language_model = base.language_model
        decoder = language_model
        while not hasattr(decoder, "layers"):
            decoder = getattr(decoder, "model", None) or getattr(decoder, "decoder", None)
            if decoder is None:
                raise UnsupportedModelError(
                    f"model: found no decoder layers in {type(language_model).__name__}"
                )
        tower = getattr(base, "vision_tower", None) or getattr(base, "vision_model", None)
        return Backbone(model, base, language_model, decoder, tower)

    def check(self, backbone: Backbone) -> None:
        """Raise `UnsupportedModelError` for what this family cannot do right."""
        kinds = set(getattr(backbone.decoder.config, "layer_types", None) or ())
        foreign = kinds - {"full_attention", "sliding_attention"}
        if foreign:
            raise UnsupportedModelError(
                f"model: {type(backbone.decoder).__name__} has layers of kind "
                f"{', '.join(sorted(foreign))}; supported are full and sliding attention"
            )
        kind = type(backbone.model).__name__
        if "token_type_ids" in inspect.signature(type(backbone.base).forward).parameters:
            raise UnsupportedModelError(
                f"model: in {kind} the tokens of an image attend to one another in both "
                "directions, which needs a family of its own"
            )
        own = getattr(type(backbone.model), "generate", GenerationMixin.generate)
        if own is not GenerationMixin.generate:
            raise UnsupportedModelError(
                f"model: {kind} has a generate of its own, which needs a family of its own"
            )
        rotary = getattr(backbone.decoder, "rotary_emb", None)
        accepted = inspect.signature(rotary.forward).parameters if rotary is not None else {}
        if rotary is None or "layer_type" in accepted:
            raise UnsupportedModelError(
                f"model: {type(backbone.decoder).__name__} has not one rotary embedding for all "
                "layers, and so needs a family of its own"
            )
        for name in ("_deepstack_process", "rope_deltas"):
            if hasattr(backbone.decoder, name) or hasattr(backbone.base, name):
                raise UnsupportedModelError(
                    f"model: {kind} has {name}, which needs a family of its own"
                )

    # ---- vision -------------------------------------------------------------------------------
    def tower_attention(self, backbone: Backbone) -> list[nn.Module]:
        """The attention module of each layer of the vision tower, first to last."""
        encoder = getattr(backbone.tower, "encoder", None)
        layers = getattr(encoder, "layers", None) or ()
        modules = [getattr(layer, "self_attn", None) for layer in layers]
        if not modules or any(m is None or not hasattr(m, "config") for m in modules):
            raise UnsupportedModelError(
                f"model: cannot read attention in the vision tower {type(backbone.tower).__name__}"
            )
        return modules  # type: ignore[return-value]

    def encoder_layers(self, backbone: Backbone) -> list[Any]:
        """The layers of the vision tower, if their parts are where a plain ViT has them."""
        encoder = getattr(backbone.tower, "encoder", None)
        layers = list(getattr(encoder, "layers", None) or ())
        parts = ("layer_norm1", "self_attn", "layer_norm2", "mlp")
        if not layers or any(not hasattr(layer, part) for layer in layers for part in parts):
            raise UnsupportedModelError(
                f"model: the layers of the vision tower {type(backbone.tower).__name__} have not "
                f"the parts {', '.join(parts)} between which patches could be merged"
            )
        self.tower_attention(backbone)
        return layers

    def encoder_depth(self, backbone: Backbone) -> int:
        """How many tower layers the features pass through."""
        count = len(self.encoder_layers(backbone))
        wanted = getattr(backbone.model.config, "vision_feature_layer", -1)
        if not isinstance(wanted, int):
            raise UnsupportedModelError(
                f"model: features of the tower layers {wanted} are joined, which is impossible "
                "once patches were merged between them"
            )
        return wanted if wanted >= 0 else count + 1 + wanted

    def has_cls(self, backbone: Backbone) -> bool:
        """Whether the first token of the tower is a [CLS] token."""
        embeddings = getattr(backbone.tower, "embeddings", None)
        return any(hasattr(embeddings, name) for name in ("class_embedding", "cls_token"))

    def projector(self, backbone: Backbone) -> nn.Module | None:
        """The module from patch states to embeddings, one row each, or `None` if not known."""
        return getattr(backbone.base, "multi_modal_projector", None)

    def cls_states(self, backbone: Backbone, output: Any) -> Tensor | None:
        """(images, d_v) states of [CLS] in the layer that the projector reads, from the tower's
        output, or `None` where there is no [CLS]."""
        if not self.has_cls(backbone):
            return None
        wanted = backbone.model.config.vision_feature_layer
        layers = [wanted] if isinstance(wanted, int) else wanted
        return torch.cat([output.hidden_states[layer][:, 0] for layer in layers], dim=-1)

    def grid(self, backbone: Backbone, n: int, image_size: tuple[int, int] | None) -> Tensor:
        """(n, 3) whole numbers (frame, row, column) of one image's tokens.

        Args:
            image_size: (height, width) in pixels where the processor passes it on.
        """
        rows = columns = math.isqrt(n)
        if image_size is not None:
            patch = backbone.tower.config.patch_size
            rows, columns = image_size[0] // patch, image_size[1] // patch
        if rows * columns != n:
            # Not a full rectangle: one row, which claims nothing about neighbours above or below.
            rows, columns = 1, n
        return grid_positions(rows, columns)

    def check_pixels(self, backbone: Backbone) -> None:
        """Raise `UnsupportedModelError` if the tower takes images of one size only."""
        tower = backbone.tower
        patch = getattr(getattr(tower, "config", None), "patch_size", None)
        if not isinstance(patch, int) or (
            "interpolate_pos_encoding" not in inspect.signature(tower.forward).parameters
        ):
            raise UnsupportedModelError(
                f"model: the vision tower {type(tower).__name__} does not interpolate its position "
                "embeddings, which down-sampling pixels needs; use how='grid'"
            )
        strategy = getattr(backbone.model.config, "vision_feature_select_strategy", None)
        if strategy == "full" and self.has_cls(backbone):
            raise UnsupportedModelError(
                "model: its vision tokens include [CLS], which has no place on a grid of fewer "
                "pixels; use how='grid'"
            )

    def downsampled_features(
        self, backbone: Backbone, encode: Any, pixel_values: Tensor, method: Any, kwargs: Any
    ) -> tuple[Any, list[tuple[tuple[int, int], tuple[int, int]]]]:
        """Run the tower on fewer pixels.

        Args:
            encode: `base.get_image_features`.
            method: has `target_grid(rows, columns) -> (rows, columns)`.

        Returns:
            What `encode` returned, and for each image its (rows, columns) before and after.
        """
        if pixel_values.dim() != 4:
            raise UnsupportedModelError(
                "method: down-sampling pixels needs pixel_values of shape (images, 3, height, "
                f"width), got {tuple(pixel_values.shape)}; use how='grid'"
            )
        patch = backbone.tower.config.patch_size
        rows, columns = pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch
        r, c = method.target_grid(rows, columns)
        if (r, c) != (rows, columns):
            pixel_values = nn.functional.interpolate(
                pixel_values.float(),
                size=(r * patch, c * patch),
                mode="bilinear",
                align_corners=False,
                antialias=True,
            ).to(pixel_values.dtype)
            kwargs = {**kwargs, "interpolate_pos_encoding": True}
        out = encode(pixel_values=pixel_values, **kwargs)
        return out, [((rows, columns), (r, c))] * pixel_values.shape[0]

    # ---- decoder ------------------------------------------------------------------------------
    def rotary(self, backbone: Backbone, layer: int, hidden: Tensor, positions: Tensor) -> Any:
        """The position embeddings that decoder layer `layer` takes, at `positions` (b, k)."""
        return backbone.decoder.rotary_emb(hidden, position_ids=positions)

    def layer_type(self, backbone: Backbone, layer: int) -> str:
        """ "full_attention" or "sliding_attention"."""
        config = backbone.decoder.config
        kinds = getattr(config, "layer_types", None)
        if kinds:
            return kinds[layer]
        sliding = getattr(config, "sliding_window", None) is not None
        return "sliding_attention" if sliding else "full_attention"


def grid_positions(rows: int, columns: int) -> Tensor:
    """(rows * columns, 3) whole numbers (0, row, column) in raster order."""
    place = torch.arange(rows * columns)
    return torch.stack([torch.zeros_like(place), place // columns, place % columns], dim=1)
