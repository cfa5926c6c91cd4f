# SPDX-License-Identifier: Apache-2.0
"""The part of an adapter that knows how patches are merged inside the vision tower."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc.core.errors import UnsupportedModelError
from vtc.core.images import Modality
from vtc.models.tower import TowerPart, setting


class MergingPart(TowerPart):
    """How a layer of the tower runs on fewer tokens; see `Adapter`."""

    projects_patches: ClassVar[bool] = True
    joins_frames: ClassVar[bool] = False
    encoder_parts: ClassVar[tuple[str, str, str, str]] = (
        *("layer_norm1", "self_attn"),
        *("layer_norm2", "mlp"),
    )

    def encoder_layers(self) -> list[Any]:
        """The layers of the vision tower, first to last.

        Raises:
            UnsupportedModelError: they lack the parts of a pre-norm ViT layer, or merged patches
                cannot pass what follows the tower.
        """
        encoder = getattr(self.tower, "encoder", None)
        layers = self._with_parts(list(getattr(encoder, "layers", None) or ()))
        if "spatial_shapes" in inspect.signature(self.tower.forward).parameters:
            raise UnsupportedModelError(
                f"model: {type(self.tower).__name__} pads images to one number of patches, and "
                "merged patches would mix with padding"
            )
        return layers

    def _with_parts(self, layers: list[Any]) -> list[Any]:
        """`layers`, all of which have `encoder_parts`.

        Raises:
            UnsupportedModelError: one has not, or its attention cannot be read.
        """
        parts = self.encoder_parts
        if not layers or any(not hasattr(layer, part) for layer in layers for part in parts):
            raise UnsupportedModelError(
                f"model: the layers of the vision tower {type(self.tower).__name__} have not "
                f"the parts {', '.join(parts)} between which patches could be merged"
            )
        self.tower_attention()
        return layers

    def encoder_attend(self, layer: Any, hidden: Tensor, given: Mapping[str, Any]) -> Tensor:
        """The first half of a tower layer: its attention, with the residual.

        Args:
            layer: of `encoder_layers`.
            hidden: (1, t, d) the tokens of one tile.
            given: the further arguments of the layer, for these tokens.

        Returns:
            (1, t, d).
        """
        norm, attention, _, _ = self.encoder_parts
        out = getattr(layer, attention)(getattr(layer, norm)(hidden), **given)
        return hidden + (out[0] if isinstance(out, tuple) else out)

    def encoder_feed(self, layer: Any, hidden: Tensor) -> Tensor:
        """The second half of a tower layer: its feed-forward, with the residual.

        Args:
            layer: of `encoder_layers`.
            hidden: (1, t, d) the tokens of one tile.

        Returns:
            (1, t, d).
        """
        _, _, norm, feed = self.encoder_parts
        return hidden + getattr(layer, feed)(getattr(layer, norm)(hidden))

    def encoder_weighed(self, given: Mapping[str, Any], bias: Tensor) -> dict[str, Any]:
        """The arguments of `encoder_attend` with which attention adds to its logits, in a tower
        that does not attend through the attention functions of transformers.

        Args:
            given: the arguments without.
            bias: (t,) what is added at each key.
        """
        raise NotImplementedError

    def encoder_output(self, hidden: Tensor) -> Any:
        """What a tower layer returns.

        Args:
            hidden: (b, n, d) or (n, d) its output.
        """
        return hidden

    def encoder_order(self, given: Mapping[str, Any], places: Tensor) -> Tensor | None:
        """The order in which a tower layer takes the tokens of one tile: window by window.

        Args:
            given: the further arguments of the layer for all tokens, by name.
            places: (t,) of the tokens in the tower's sequence, in any order.

        Returns:
            (t,) indices into `places`, or `None` for the same order.
        """
        return None

    def encoder_given(self, given: Mapping[str, Any], row: int, places: Tensor) -> dict[str, Any]:
        """The further arguments of a tower layer for some tokens of one tile.

        Tiles run on their own, so that a mask that keeps tiles apart is left out.

        Args:
            given: the arguments for all tokens, by name.
            row: of the tower's batch.
            places: (t,) of the tokens in the tower's sequence, in their order.

        Returns:
            The arguments that `encoder_attend` receives.
        """
        return {name: value for name, value in given.items() if name != "attention_mask"}

    def check_encoder(self, modality: Modality, given: Mapping[str, Any]) -> None:
        """Refuse inputs whose patches cannot be merged in the tower.

        Args:
            modality: "image" or "video".
            given: the arguments of `get_image_features` or `get_video_features`.

        Raises:
            UnsupportedModelError: what follows the tower mixes the features of patches, or patches
                are hidden from one another.
        """

    def encoder_tiles(
        self, modality: Modality, given: Mapping[str, Any], rows: int, length: int
    ) -> list[tuple[int, Tensor, Tensor]]:
        """The tiles of the tower's sequence, each merged on its own.

        Args:
            modality: "image" or "video".
            given: the arguments of `get_image_features` or `get_video_features`.
            rows: rows of the tower's batch.
            length: tokens of a row, with [CLS]; other numbers before and after a tower has joined
                patches between its layers, which must lie within a unit.

        Returns:
            For each tile, in the order of their patches: its row; (p,) the places in this row of
            the tokens that are never merged, [CLS] first; and (u, m) the places of the m patches of
            each of its u units, which are what becomes one token each.
        """
        cls = self.cls_place()
        units = self.encoder_units(modality, length - int(cls is not None)) + int(cls == 0)
        fixed = torch.ones(length, dtype=torch.bool)
        fixed[units.flatten()] = False
        return [(row, fixed.nonzero()[:, 0], units) for row in range(rows)]

    def encoder_units(self, modality: Modality, n: int) -> Tensor:
        """The patches of a tile that become one token each.

        Args:
            modality: "image" or "video".
            n: number of patches of the tile.

        Returns:
            (u, m) their numbers in the tile.
        """
        return torch.arange(n)[:, None]

    def encoder_projectors(self) -> list[Any]:
        """The modules after the tower that work token by token, so that they can leave out tokens:
        their input has a row for each patch, unit by unit, or for each token. What else follows the
        tower runs on all places."""
        projector = self.projector()
        return [] if projector is None else [projector]

    def encoder_depth(self, given: Mapping[str, Any]) -> int:
        """The number of tower layers that the features pass through.

        Where features of several layers are joined, this is the deepest. A token's features of an
        earlier layer are then those of the token that held its first patch there.

        Args:
            given: the arguments of `get_image_features`, which override the config.

        Returns:
            A number of layers, from 1.

        Raises:
            UnsupportedModelError: the tower is not a plain ViT.
        """
        count = len(self.encoder_layers())
        wanted: Any = setting(self, given, "vision_feature_layer", -1)
        layers = [wanted] if isinstance(wanted, int) else list(wanted)
        return max(layer if layer >= 0 else count + 1 + layer for layer in layers)
