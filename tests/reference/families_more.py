# SPDX-License-Identifier: Apache-2.0
"""The families of `families.py`: their configs, and their images as processors lay them out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import transformers as hf
from torch import Tensor

from tests.reference.families import (
    END,
    IMAGE,
    START,
    TAG,
    VIDEO,
    VOCABULARY,
    OneGrid,
    Piece,
    Tiled,
    TinyFamily,
    cells,
    join,
    long,
    marks,
    pixels,
    register,
    text_settings,
    vision_settings,
)


# ---- one grid per image -------------------------------------------------------------------------
class VipLlava(OneGrid):
    name = model_type = "vipllava"
    model_class = "VipLlavaForConditionalGeneration"
    notes = "features of several tower layers (three here) are joined before the projector"

    def config(self) -> Any:
        return hf.VipLlavaConfig(
            vision_config=hf.CLIPVisionConfig(**vision_settings(28, projection_dim=16)),
            text_config=hf.LlamaConfig(**text_settings()),
            image_token_index=IMAGE,
            image_seq_length=16,
            vision_feature_layers=[-1, -2, 1],  # type: ignore[call-arg]
        )


class PaliGemma(OneGrid):
    name = model_type = "paligemma"
    model_class = "PaliGemmaForConditionalGeneration"
    per_token = ("token_type_ids",)
    notes = "prefix-LM: the whole prompt attends in both directions; positions start at 1"

    def text_config(self) -> Any:
        return hf.GemmaConfig(**text_settings(head_dim=8))

    def config(self) -> Any:
        return hf.PaliGemmaConfig(
            vision_config=hf.SiglipVisionConfig(
                **vision_settings(28, projection_dim=32, vision_use_head=False)
            ),
            text_config=self.text_config(),
            image_token_index=IMAGE,
            vocab_size=VOCABULARY,
            projection_dim=32,
            hidden_size=32,
            tie_word_embeddings=False,
        )

    def finish(self, input_ids: Tensor, images: int, extras: dict[str, Tensor]) -> None:
        extras["token_type_ids"] = torch.zeros_like(input_ids)[None]


class Gemma3(OneGrid):
    model_type = "gemma3"
    model_class = "Gemma3ForConditionalGeneration"
    per_token = ("token_type_ids",)
    before, after = (START,), (END,)

    def __init__(self, name: str, window: int) -> None:
        self.name, self.window = name, window
        self.notes = f"images attend in both directions; sliding window of {window}"

    def config(self) -> Any:
        return hf.Gemma3Config(
            vision_config=hf.SiglipVisionConfig(**vision_settings(56, vision_use_head=False)),
            text_config=hf.Gemma3TextConfig(
                **text_settings(
                    head_dim=8,
                    query_pre_attn_scalar=8,
                    sliding_window=self.window,
                    layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
                )
            ),
            mm_tokens_per_image=16,
            boi_token_index=START,
            eoi_token_index=END,
            image_token_index=IMAGE,
            tie_word_embeddings=False,
        )

    side_pixels = 56

    def finish(self, input_ids: Tensor, images: int, extras: dict[str, Tensor]) -> None:
        extras["token_type_ids"] = (input_ids == IMAGE).long()[None]


register(VipLlava(), PaliGemma(), Gemma3("gemma3", 400), Gemma3("gemma3_short", 12))


# ---- tiles fused into one plane -----------------------------------------------------------------
class LlavaNext(TinyFamily):
    name = model_type = "llava_next"
    model_class = "LlavaNextForConditionalGeneration"
    sizes = ((21, 42), (42, 30), (21, 21))
    notes = "tiles of 3x3 tokens are fused into one un-padded plane with a newline after each row"
    tile, patch = 3, 7

    def config(self) -> Any:
        return hf.LlavaNextConfig(
            vision_config=hf.CLIPVisionConfig(**vision_settings(21, projection_dim=16)),
            text_config=hf.LlamaConfig(**text_settings()),
            image_token_index=IMAGE,
            image_grid_pinpoints=[[21, 42], [42, 21], [42, 42]],
            image_seq_length=9,
        )

    # Size in pixels: (tile rows, tile columns, rows and columns cut on either side).
    planes: ClassVar = {(21, 42): (1, 2, 0, 0), (42, 30): (2, 2, 0, 1), (21, 21): (1, 2, 0, 1)}

    def image(self, which: int, generator: torch.Generator, count: int) -> Piece:
        size = self.sizes[which]
        down, across, cut_rows, cut_columns = self.planes[size]
        tokens = cells(self.tile, self.tile, crop=0)
        for r in range(cut_rows, down * self.tile - cut_rows):
            for c in range(cut_columns, across * self.tile - cut_columns):
                crop = 1 + r // self.tile * across + c // self.tile
                tokens.append((IMAGE, (0, r - cut_rows, c - cut_columns, crop)))
            tokens += marks(IMAGE)
        side = self.tile * self.patch
        extras = {
            "pixel_values": pixels(generator, 1, 1 + down * across, 3, side, side),
            "image_sizes": long(*size),
        }
        return Piece(tokens, extras)


class LlavaNextVideo(LlavaNext):
    name = model_type = "llava_next_video"
    model_class = "LlavaNextVideoForConditionalGeneration"
    has_video = True
    notes = "images as llava_next with tiles of 4x4; frames are pooled by 2, without newlines"
    tile = 4
    sizes = ((28, 56), (56, 42), (28, 28))
    planes: ClassVar = {(28, 56): (1, 2, 0, 0), (56, 42): (2, 2, 0, 1), (28, 28): (1, 2, 0, 2)}

    def config(self) -> Any:
        return hf.LlavaNextVideoConfig(
            vision_config=hf.CLIPVisionConfig(**vision_settings(28, projection_dim=16)),
            text_config=hf.LlamaConfig(**text_settings()),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
            image_seq_length=16,
            video_seq_length=4,
        )

    def video(self, which: int, generator: torch.Generator) -> Piece:
        frames = 4  # clips of a batch are stacked, so they have equally many
        tokens = [t for f in range(frames) for t in cells(2, 2, frame=f, token=VIDEO)]
        clip = pixels(generator, 1, frames, 3, 28, 28)
        return Piece(tokens, {"pixel_values_videos": clip}, video=True)


class LlavaOneVision(LlavaNext):
    model_type = "llava_onevision"
    model_class = "LlavaOnevisionForConditionalGeneration"
    has_video = True
    per_row = ("batch_num_images",)

    def __init__(self, name: str, most: int) -> None:
        self.name, self.most = name, most
        self.notes = (
            "as llava_next; of several images in a row only the thumbnails, each with one newline; "
            f"planes of more than {most} tiles are shrunk bilinearly; a clip ends in one newline"
        )

    def config(self) -> Any:
        return hf.LlavaOnevisionConfig(
            vision_config=hf.SiglipVisionConfig(**vision_settings(21, vision_use_head=False)),
            text_config=hf.Qwen2Config(**text_settings()),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=[[21, 42], [42, 21], [42, 42]],
            vision_aspect_ratio=f"anyres_max_{self.most}",
        )

    def image(self, which: int, generator: torch.Generator, count: int) -> Piece:
        piece = super().image(which, generator, count)
        if count > 1:
            piece.tokens = [*cells(3, 3), *marks(IMAGE)]
            piece.extras["pixel_values"] = piece.extras["pixel_values"][:, :1]
        elif self.most == 1:
            rows, columns = ((2, 4), (3, 2), (2, 3))[which]
            piece.tokens = cells(3, 3, crop=0)
            for r in range(rows):
                for c in range(columns):
                    piece.tokens.append((IMAGE, (0, r, c, self._crop(which, r, c, rows, columns))))
                piece.tokens += marks(IMAGE)
        return piece

    def _crop(self, which: int, r: int, c: int, rows: int, columns: int) -> int:
        """The tile in which the middle of a shrunk cell lies."""
        down, across, cut_rows, cut_columns = self.planes[self.sizes[which]]
        height, width = 3 * down - 2 * cut_rows, 3 * across - 2 * cut_columns
        row = int(cut_rows + (r + 0.5) * height / rows)
        column = int(cut_columns + (c + 0.5) * width / columns)
        return 1 + row // 3 * across + column // 3

    def finish(self, input_ids: Tensor, images: int, extras: dict[str, Tensor]) -> None:
        if images:
            extras["batch_num_images"] = torch.tensor([images])

    def video(self, which: int, generator: torch.Generator) -> Piece:
        tokens = [t for f in range(4) for t in cells(2, 2, frame=f, token=VIDEO)]
        clip = pixels(generator, 1, 4, 3, 21, 21)
        return Piece([*tokens, *marks(VIDEO)], {"pixel_values_videos": clip}, video=True)


register(
    LlavaNext(),
    LlavaNextVideo(),
    LlavaOneVision("llava_onevision", 9),
    LlavaOneVision("llava_onevision_shrunk", 1),
)


# ---- tiles after tiles --------------------------------------------------------------------------
class InternVL(Tiled):
    name = model_type = "internvl"
    model_class = "InternVLForConditionalGeneration"
    has_video = True
    notes = "tiles first, thumbnail last, with nothing between; frames of a clip are images"

    def config(self) -> Any:
        return hf.InternVLConfig(
            vision_config=hf.InternVLVisionConfig(
                **vision_settings(42, use_mask_token=False)
                | {"image_size": [42, 42], "patch_size": [7, 7]}
            ),
            text_config=hf.Qwen2Config(**text_settings()),
            image_token_id=IMAGE,
            image_seq_length=9,
            tie_word_embeddings=False,
        )

    tiling = ((1, 2), (2, 2), (0, 0))

    def image(self, which: int, generator: torch.Generator, count: int) -> Piece:
        down, across = self.tiling[which]
        tokens = marks(START, kind="text")
        for crop in range(1, down * across + 1):
            tokens += self.tile(crop)
        tokens += [*self.tile(0 if down else None), *marks(END, kind="text")]
        return Piece(tokens, self.extras(down * across + 1, generator))

    def video(self, which: int, generator: torch.Generator) -> Piece:
        tokens: list[Any] = []
        for f in range(3 + which):
            tokens += marks(*[TAG] * bool(f), TAG + 1 + f, START, kind="text")
            tokens += [*cells(3, 3, frame=f), *marks(END, kind="text")]
        return Piece(tokens, self.extras(3 + which, generator), video=True)


class AyaVision(Tiled):
    name = model_type = "aya_vision"
    model_class = "AyaVisionForConditionalGeneration"
    notes = "a tag before each tile; layers alternate between sliding windows and full attention"
    window = 400

    def config(self) -> Any:
        return hf.AyaVisionConfig(
            vision_config=hf.SiglipVisionConfig(**vision_settings(42, vision_use_head=False)),
            text_config=hf.Cohere2Config(
                **text_settings(
                    head_dim=8,
                    sliding_window=self.window,
                    layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
                )
            ),
            image_token_index=IMAGE,
            tie_word_embeddings=False,
        )

    def image(self, which: int, generator: torch.Generator, count: int) -> Piece:
        down, across = self.tiling[which]
        tokens = marks(START, kind="text")
        for crop in range(1, down * across + 1):
            tokens += [*marks(TAG + crop), *self.tile(crop)]
        tokens += [*marks(TAG), *self.tile(0 if down else None), *marks(END, kind="text")]
        return Piece(tokens, self.extras(down * across + 1, generator))


class AyaVisionShort(AyaVision):
    name = "aya_vision_short"
    window = 12
    notes = AyaVision.notes + "; the window is shorter than prompts"


class Cohere2Vision(AyaVision):
    name = model_type = "cohere2_vision"
    model_class = "Cohere2VisionForConditionalGeneration"
    notes = "a line break after each tile, the thumbnail last; sliding windows and full attention"

    def config(self) -> Any:
        return hf.Cohere2VisionConfig(
            vision_config=hf.SiglipVisionConfig(**vision_settings(42, vision_use_head=False)),
            text_config=super().config().text_config,
            image_token_id=IMAGE,
            alignment_intermediate_size=48,
            tie_word_embeddings=False,
        )

    def image(self, which: int, generator: torch.Generator, count: int) -> Piece:
        down, across = self.tiling[which]
        tokens = marks(START, kind="text")
        for crop in [*range(1, down * across + 1), 0 if down else None]:
            tokens += [*self.tile(crop), *marks(TAG)]
        return Piece([*tokens, *marks(END, kind="text")], self.extras(down * across + 1, generator))


class Llama4(Tiled):
    model_type = "llama4"
    model_class = "Llama4ForConditionalGeneration"

    def __init__(self, name: str, chunk: int) -> None:
        self.name, self.chunk = name, chunk
        self.notes = (
            f"chunked attention of {chunk} and full layers without rotary positions; mixture of "
            "experts; the projector runs after get_image_features; separators between tiles; "
            "build repairs the plain model, whose forward fails in transformers 5.24.0; beams with "
            "images fail there too, since pooler_output is None; attn_temperature_tuning is off"
        )

    def config(self) -> Any:
        return hf.Llama4Config(
            vision_config=hf.Llama4VisionConfig(
                **vision_settings(42, intermediate_size=128),
                vision_output_dim=32,
                projector_input_dim=32,
                projector_output_dim=32,
            ),
            text_config=hf.Llama4TextConfig(
                **text_settings(head_dim=8),
                intermediate_size_mlp=48,
                num_local_experts=2,
                num_experts_per_tok=1,
                moe_layers=[1, 3],
                no_rope_layers=[1, 1, 0, 1, 1, 0],
                attention_chunk_size=self.chunk,
                attn_temperature_tuning=False,
            ),
            boi_token_index=START,
            eoi_token_index=END,
            image_token_index=IMAGE,
        )

    def build(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = super().build(*args, **kwargs)
        # Its forward reads outputs.image_outputs of the language model, which has no such field
        # in transformers 5.24.0: without this every call fails, with and without images.
        model.language_model.register_forward_hook(add_image_outputs)
        return model

    def image(self, which: int, generator: torch.Generator, count: int) -> Piece:
        down, across = self.tiling[which]
        tokens = marks(START, kind="text")
        for row in range(down):
            for column in range(across):
                tokens += self.tile(1 + row * across + column)
                tokens += marks(*[TAG] * (column < across - 1))
            tokens += marks(TAG + 1)
        tokens += [*marks(TAG + 2), *self.tile(0 if down else None), *marks(END, kind="text")]
        return Piece(tokens, self.extras(1 + down * across, generator))


def add_image_outputs(module: Any, args: Any, output: Any) -> None:
    output.image_outputs = getattr(output, "image_outputs", None)


class Idefics3(Tiled):
    model_type, model_class = "idefics3", "Idefics3ForConditionalGeneration"
    name = "idefics3"
    per_row = ("pixel_values", "pixel_attention_mask")
    notes = "a tag before each tile, the thumbnail last; no get_placeholder_mask; text_model"

    def config(self) -> Any:
        return hf.Idefics3Config(
            vision_config=hf.Idefics3VisionConfig(**vision_settings(42)),
            text_config=hf.LlamaConfig(**text_settings()),
            image_token_id=IMAGE,
            scale_factor=2,
        )

    def image(self, which: int, generator: torch.Generator, count: int) -> Piece:
        down, across = self.tiling[which]
        tokens: list[Any] = []
        for row in range(down):
            for column in range(across):
                crop = 1 + row * across + column
                tokens += marks(START, kind="text" if crop == 1 else "separator")
                tokens += [*marks(TAG + crop), *self.tile(crop)]
            tokens += marks(END)
        tokens += marks(*[END] * bool(down), START, TAG, kind="separator" if down else "text")
        tokens += [*self.tile(0 if down else None), *marks(START, kind="text")]
        return Piece(tokens, self.extras(1 + down * across, generator))

    def extras(self, tiles: int, generator: torch.Generator) -> dict[str, Tensor]:
        size = self.side_pixels
        return {
            "pixel_values": pixels(generator, 1, tiles, 3, size, size),
            "pixel_attention_mask": torch.ones(1, tiles, size, size, dtype=torch.long),
        }

    def join(self, name: str, values: Sequence[Tensor]) -> Tensor:
        return join(values, dim=1)


class SmolVLM(Idefics3):
    model_type, model_class = "smolvlm", "SmolVLMForConditionalGeneration"
    name = "smolvlm"
    has_video = True
    notes = "as idefics3, but with get_placeholder_mask; frames of a clip are images"

    def config(self) -> Any:
        return hf.SmolVLMConfig(
            vision_config=hf.SmolVLMVisionConfig(**vision_settings(42)),
            text_config=hf.LlamaConfig(**text_settings()),
            image_token_id=IMAGE,
            scale_factor=2,
        )

    def video(self, which: int, generator: torch.Generator) -> Piece:
        tokens: list[Any] = []
        for f in range(3 + which):
            tokens += [*marks(TAG + 1 + f, START, TAG, kind="text"), *cells(3, 3, frame=f)]
            tokens += marks(START, END, kind="text")
        return Piece(tokens, self.extras(3 + which, generator), video=True)


register(
    InternVL(),
    AyaVision(),
    AyaVisionShort(),
    Cohere2Vision(),
    Llama4("llama4", 400),
    Llama4("llama4_short", 16),
    Idefics3(),
    SmolVLM(),
)
