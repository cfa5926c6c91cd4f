# SPDX-License-Identifier: Apache-2.0
"""More of `tests.reference.families`: those whose shape is not "placeholders in a decoder"."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import transformers as hf

from tests.reference.families import (
    END,
    FIRST_WORD,
    IMAGE,
    START,
    TAG,
    VOCABULARY,
    OneGrid,
    Piece,
    TinyFamily,
    cells,
    long,
    marks,
    pixels,
    register,
    text_settings,
    vision_settings,
)
from tests.reference.families_own import InstructBlip

CODES = range(VOCABULARY, VOCABULARY + 512)
"""Ids of the codes of a VQ-VAE."""


class Janus(OneGrid):
    name = model_type = "janus"
    model_class = "JanusForConditionalGeneration"
    before, after = (START,), (END,)
    notes = "its generate makes images, too; the projector is aligner"

    def config(self) -> Any:
        vision = vision_settings(28, projection_dim=32, mlp_ratio=1.5, num_image_tokens=16)
        del vision["intermediate_size"]
        codes = {
            "embed_dim": 8,
            "num_embeddings": 16,
            "latent_channels": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "projection_dim": 32,
            "image_token_embed_dim": 32,
        }
        return hf.JanusConfig(
            vision_config=vision,
            text_config=hf.LlamaConfig(**text_settings()).to_dict(),
            vq_config=codes,
            image_token_id=IMAGE,
            tie_word_embeddings=False,
        )


class Chameleon(OneGrid):
    model_type = "chameleon"
    model_class = "ChameleonForConditionalGeneration"
    before, after = (START,), (END,)
    never = (*range(FIRST_WORD), *CODES)
    notes = "the base model is the decoder; images are codes of a VQ-VAE, as words are"

    def __init__(self, name: str, swin_norm: bool) -> None:
        self.name, self.swin_norm = name, swin_norm

    def config(self) -> Any:
        letters = str.maketrans("0123456789", "ABCDEFGHIJ")
        names = {f"IMGIMG{i}Z".translate(letters): code for i, code in enumerate(CODES)}
        return hf.ChameleonConfig(
            **text_settings(swin_norm=self.swin_norm, vocab_size=CODES.stop),
            vq_config={
                "embed_dim": 8,
                "num_embeddings": len(CODES),
                "latent_channels": 8,
                "resolution": 28,
                "base_channels": 32,
                "channel_multiplier": [1, 1, 1],
                "num_res_blocks": 1,
            },
            vocabulary_map={"<image>": IMAGE, **names},
        )

    def image(self, which: int, generator: torch.Generator, count: int) -> Piece:
        piece = super().image(which, generator, count)
        return Piece(piece.tokens, {"pixel_values": pixels(generator, 1, 3, 16, 16)})


class Emu3(TinyFamily):
    name = model_type = "emu3"
    model_class = "Emu3ForConditionalGeneration"
    never = (*range(FIRST_WORD), *CODES)
    sizes: ClassVar = ((4, 5), (4, 5), (4, 5))
    notes = (
        "images are codes of a VQ-VAE, as words are; a code ends each row. All have one size: "
        "where a batch pads one, the convolutions of the plain model give it other codes"
    )

    def config(self) -> Any:
        names = {f"<|visual token {i:06d}|>": code for i, code in enumerate(CODES)}
        return hf.Emu3Config(
            vq_config={
                "codebook_size": len(CODES),
                "embed_dim": 4,
                "latent_channels": 4,
                "base_channels": 32,
                "channel_multiplier": [1, 1, 1],
                "num_res_blocks": 1,
                "attn_resolutions": [2],
                "hidden_size": 32,
            },
            text_config=text_settings(vocab_size=CODES.stop, attention_dropout=0.0),
            vocabulary_map={"<image>": IMAGE, "<|extra_200|>": TAG, **names},
            tie_word_embeddings=False,
        )

    def build(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = super().build(*args, **kwargs)
        # Latents are small; with codes as far apart as drawn, nearly all would be the same.
        model.model.vqmodel.quantize.embedding.weight.data *= 0.1
        return model

    def image(self, which: int, generator: torch.Generator, count: int) -> Piece:
        rows, columns = self.sizes[which]
        tokens: list[Any] = marks(START, kind="text")
        for r in range(rows):
            tokens += [(IMAGE, (0, r, c, None)) for c in range(columns)]
            tokens += marks(IMAGE)
        tokens += marks(END, kind="text")
        extras = {
            "pixel_values": pixels(generator, 1, 3, 4 * rows, 4 * columns),
            "image_sizes": long(4 * rows, 4 * columns),
        }
        return Piece(tokens, extras)


class Apertus15(Emu3):
    name = model_type = "apertus1p5"
    model_class = "Apertus1p5ForConditionalGeneration"
    sizes: ClassVar = ((4, 5), (3, 6), (2, 4))
    attentions = ("eager",)
    notes = "images of any size are codes of a tokenizer, as words are"

    def config(self) -> Any:
        return hf.Apertus1p5Config(
            vision_config={
                "codebook_size": len(CODES),
                "embed_dim": 4,
                "latent_channels": 4,
                "base_channels": 32,
                "channel_multiplier": [1, 1, 1],
                "num_res_blocks": 1,
                "attn_resolutions": [2],
                "resolution": 8,
            },
            audio_config={
                "model_type": "wavtokenizer_encoder",
                "num_filters": 4,
                "num_lstm_layers": 1,
                "hidden_size": 8,
                "codebook_size": 16,
                "codebook_dim": 8,
            },
            text_config=text_settings(vocab_size=CODES.stop + 16),
            image_token_id=IMAGE,
            audio_token_id=TAG,
            image_token_offset=CODES.start,
            audio_token_offset=CODES.stop,
        )

    def build(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = TinyFamily.build(self, *args, **kwargs)
        model.model.vision_tokenizer.quantize.embedding.weight.data *= 0.1
        return model

    def image(self, which: int, generator: torch.Generator, count: int) -> Piece:
        rows, columns = self.sizes[which]
        extras = {
            "pixel_values": pixels(generator, 1, 3, 24, 24),
            "image_sizes": long(4 * rows, 4 * columns),
        }
        return Piece([*marks(START, kind="text"), *cells(rows, columns)], extras)


class InstructBlipVideo(InstructBlip):
    name = model_type = "instructblipvideo"
    model_class = "InstructBlipVideoForConditionalGeneration"
    has_video = True
    layouts: ClassVar = {
        **InstructBlip.layouts,
        # Clips of a batch have equally many frames.
        "video": ((2, "video0", 7), (4, "video1", 3)),
    }

    def config(self) -> Any:
        text = hf.LlamaConfig(**text_settings())
        settings = self.settings() | {"video_token_index": IMAGE}
        del settings["image_token_index"]
        return hf.InstructBlipVideoConfig(text_config=text.to_dict(), **settings)

    def image(self, which: int, generator: torch.Generator, count: int) -> Piece:
        return Piece(cells(1, 16), {"pixel_values": pixels(generator, 1, 1, 3, 28, 28)})

    def video(self, which: int, generator: torch.Generator) -> Piece:
        tokens = cells(1, 32)
        return Piece(tokens, {"pixel_values": pixels(generator, 1, 2, 3, 28, 28)}, video=True)


register(
    InstructBlipVideo(),
    Janus(),
    Chameleon("chameleon", False),
    Chameleon("chameleon_swin", True),
    Emu3(),
    Apertus15(),
)
