# SPDX-License-Identifier: Apache-2.0
"""BLIP-2 and InstructBLIP, for images and for clips: the queries of a Q-Former are the vision
tokens of a whole language model, whose own `generate` runs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from vtc.core.images import ImageMap, Modality
from vtc.models.base import UnsupportedModelError, decoder_in, require
from vtc.models.resampled import Resampled
from vtc.models.seq2seq import Seq2Seq


class Blip2(Resampled):
    """A Q-Former makes a fixed number of tokens of each image or frame, which have no places. The
    language model, such as OPT or Vicuna, is a model of its own. The positions of OPT are learned
    and added to what enters, so that gaps cannot close between layers. Of T5, which has an encoder
    and a decoder, methods drop tokens before the encoder, and none between layers."""

    name: ClassVar[str] = "blip-2, instructblip"
    model_types: ClassVar[tuple[str, ...]] = ("blip-2", "instructblip")
    unmerged: ClassVar[str] = "each token mixes all patches of its image (a Q-Former)"
    own_generate: ClassVar[bool] = True
    nested: ClassVar[bool] = True
    encodes: ClassVar[Modality] = "image"

    @classmethod
    def bind(cls, model: nn.Module) -> Self:
        parts = (cls.merger, f"get_{cls.encodes}_features", "language_model", "generate")
        require(model, model, parts)
        base: Any = model
        if base.language_model.config.is_encoder_decoder:
            both: Any = Blip2Seq2Seq if cls.encodes == "image" else InstructBlipVideoSeq2Seq
            found: Self = both(model, base, base.language_model.encoder, base.vision_model)
            return found
        return cls(model, base, decoder_in(base.language_model), base.vision_model)

    def check(self) -> None:
        super().check()
        if not (hasattr(self.decoder, "rotary_emb") or self.learned or self.seq2seq):
            raise UnsupportedModelError(
                f"model: {type(self.decoder).__name__} has neither one rotary embedding for all "
                "layers nor the learned positions of OPT"
            )

    @property
    def generator(self) -> Any:
        return self.base.language_model

    @property
    def learned(self) -> bool:
        return type(self.decoder).__name__ == "OPTDecoder"

    # ---- what OPT has instead of rotary positions -----------------------------------------------
    def rotates(self, layer: int) -> bool:
        return not self.learned and super().rotates(layer)

    def rotary(self, layer: int, hidden: Tensor, positions: Tensor) -> Any:
        return None if self.learned else super().rotary(layer, hidden, positions)

    def numbered(self, mask: Tensor | None, past: int, count: int, device: Any) -> Tensor:
        if mask is None or not self.learned:
            return super().numbered(mask, past, count, device)
        mask = mask.long()
        return (mask.cumsum(1) * mask - 1)[:, past:].to(device)

    def can_peek(self, layer: int) -> bool:
        return self.learned or super().can_peek(layer)

    def attention_input(self, layer: int, hidden: Tensor) -> Tensor:
        if not self.learned:
            return super().attention_input(layer, hidden)
        found: Any = self.layers[layer]
        return found.self_attn_layer_norm(hidden) if found.do_layer_norm_before else hidden

    # ---- the Q-Former ---------------------------------------------------------------------------
    def resampler_attention(self) -> list[nn.Module]:
        return [layer.attention.attention for layer in self.base.qformer.encoder.layer]

    def tokens_in(self, length: int) -> slice:
        return slice(0, self.queries())  # the text of InstructBLIP follows

    def projector(self) -> Any:
        return self.base.language_projection

    @property
    def encodes_apart(self) -> bool:
        """Whether `generate` runs the tower and the Q-Former itself, without `get_*_features`."""
        code = inspect.unwrap(type(self.model).generate).__code__
        return f"get_{self.encodes}_features" not in code.co_names

    # ---- features and placeholders --------------------------------------------------------------
    def queries(self) -> int:
        """The number of tokens of an image or a frame."""
        return int(self.model.config.num_query_tokens)

    def placeholders(self, output: Any, given: Mapping[str, Any]) -> dict[Modality, Tensor]:
        return {self.encodes: output[..., 0] if output.dim() == 3 else output}

    def embedded(self, given: Mapping[str, Any], ids: Tensor | None, merged: Tensor) -> Tensor:
        """Locate the placeholders in the prompt of `generate`.

        Args:
            given: the arguments of `generate`.
            ids: (b, s) the prompt, or `None`.
            merged: (b, s, d) what the model hands to its language model.

        Returns:
            (b, s) bool.
        """
        token = getattr(self.model.config, f"{self.encodes}_token_id")
        if ids is not None:
            return ids == token
        embeds = given.get("inputs_embeds")
        if embeds is None:  # the model's own prompt: the images, and the first token of a text
            place = torch.arange(merged.shape[1], device=merged.device)
            return (place < merged.shape[1] - 1).expand(merged.shape[:2])
        table = self.base.get_input_embeddings()
        mark = table(torch.full((), token, dtype=torch.long, device=embeds.device))
        return (embeds == mark).all(-1)

    def image_maps(
        self, modality: Modality, given: Mapping[str, Any], features: Any
    ) -> list[list[ImageMap]]:
        n = len(features[0])  # the same for all
        return [[self.of_queries(n, i * n)] for i in range(len(features))]


class InstructBlipVideo(Blip2):
    """As InstructBLIP, for clips: a Q-Former makes a fixed number of tokens of each frame, which
    have no places. An image is a clip of one frame."""

    name: ClassVar[str] = "instructblipvideo"
    model_types: ClassVar[tuple[str, ...]] = ("instructblipvideo",)
    video: ClassVar[bool] = True
    encodes: ClassVar[Modality] = "video"


class Blip2Seq2Seq(Seq2Seq, Blip2):
    """With T5, whose encoder reads the tokens of the Q-Former and the text."""

    name: ClassVar[str] = Blip2.name

    @property
    def reader(self) -> Any:
        return self.base.language_model.decoder


class InstructBlipVideoSeq2Seq(Seq2Seq, InstructBlipVideo):
    """The same for clips."""

    name: ClassVar[str] = InstructBlipVideo.name

    @property
    def reader(self) -> Any:
        return self.base.language_model.decoder
