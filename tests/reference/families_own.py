# SPDX-License-Identifier: Apache-2.0
"""More of `tests.reference.families`: towers and language models of a shape of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import transformers as hf
from torch import Tensor

from tests.reference.families import (
    END,
    IMAGE,
    LAYERS,
    PAD,
    START,
    TAG,
    VIDEO,
    VOCABULARY,
    OneGrid,
    Piece,
    Row,
    Tiled,
    TinyFamily,
    cells,
    join,
    marks,
    pixels,
    register,
    text_settings,
    vision_settings,
)


# ---- towers -------------------------------------------------------------------------------------
class VideoLlava(OneGrid):
    name = model_type = "video_llava"
    model_class = "VideoLlavaForConditionalGeneration"
    has_video = True
    notes = "two towers; frames of a clip keep their [CLS], a placeholder that is no patch"

    def config(self) -> Any:
        return hf.VideoLlavaConfig(
            vision_config=hf.CLIPVisionConfig(**vision_settings(28, projection_dim=16)),
            text_config=hf.LlamaConfig(**text_settings()),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_seq_length=16,
            video_seq_length=17,
        )

    def video(self, which: int, generator: torch.Generator) -> Piece:
        tokens: list[Any] = []
        for f in range(2):  # clips of a batch are stacked, so they have equally many frames
            tokens += [*marks(VIDEO), *cells(4, 4, frame=f, token=VIDEO)]
        clip = pixels(generator, 1, 2, 3, 28, 28)
        return Piece(tokens, {"pixel_values_videos": clip}, video=True)


class DeepseekVL(OneGrid):
    name = model_type = "deepseek_vl"
    model_class = "DeepseekVLForConditionalGeneration"
    notes = "the tower is vision_model, the projector aligner"

    def config(self) -> Any:
        return hf.DeepseekVLConfig(**self.settings())

    def settings(self) -> dict[str, Any]:
        return {
            "vision_config": hf.SiglipVisionConfig(**vision_settings(28, vision_use_head=False)),
            "text_config": hf.LlamaConfig(**text_settings()),
            "image_token_id": IMAGE,
            "tie_word_embeddings": False,
        }


class DeepseekVLHybrid(DeepseekVL):
    name = model_type = "deepseek_vl_hybrid"
    model_class = "DeepseekVLHybridForConditionalGeneration"
    notes = "two towers on two resolutions, channels joined token by token"

    def config(self) -> Any:
        sam = hf.SamVisionConfig(
            **vision_settings(64, patch_size=8),
            output_channels=8,
            mlp_dim=48,
            window_size=4,
            global_attn_indexes=[1],
        )
        return hf.DeepseekVLHybridConfig(high_res_vision_config=sam, **self.settings())

    def image(self, which: int, generator: torch.Generator, count: int) -> Piece:
        piece = super().image(which, generator, count)
        piece.extras["high_res_pixel_values"] = pixels(generator, 1, 3, 64, 64)
        return piece


class GotOcr2(OneGrid):
    name = model_type = "got_ocr2"
    model_class = "GotOcr2ForConditionalGeneration"
    before, after = (START,), (END,)
    side_pixels = 128
    attentions = ("eager",)
    notes = (
        "a SAM tower, whose windows do not divide its map, shrunk by 4 by the convolutions of the "
        "projector"
    )

    def config(self) -> Any:
        vision = vision_settings(128, patch_size=8)
        del vision["intermediate_size"]
        return hf.GotOcr2Config(
            vision_config=vision
            | {"output_channels": 8, "mlp_dim": 48, "window_size": 5, "global_attn_indexes": [1]},
            text_config=hf.Qwen2Config(**text_settings()),
            image_token_index=IMAGE,
            image_seq_length=16,
            tie_word_embeddings=False,
        )


class Ovis2(Tiled):
    name = model_type = "ovis2"
    model_class = "Ovis2ForConditionalGeneration"
    notes = (
        "features are mixtures of a visual vocabulary; five indicator tokens around and between "
        "tiles get features too, in any call with images; the thumbnail comes first"
    )

    def config(self) -> Any:
        return hf.Ovis2Config(
            vision_config={
                **vision_settings(42),
                "vocab_size": 48,
                "hidden_stride": 2,
                "num_visual_indicator_tokens": 5,
            },
            text_config=hf.Qwen2Config(**text_settings()),
            image_token_id=IMAGE,
            visual_indicator_token_ids=[START, TAG, TAG + 1, TAG + 2, END],
            vocab_size=VOCABULARY,
            hidden_size=32,
            tie_word_embeddings=False,
        )

    def image(self, which: int, generator: torch.Generator, count: int) -> Piece:
        down, across = self.tiling[which]
        tokens = [*marks(START), *self.tile(0 if down else None), *marks(TAG)]
        for row in range(down):
            for column in range(across):
                tokens += self.tile(1 + row * across + column)
                tokens += marks(*[TAG + 1] * (column < across - 1))
            tokens += marks(*[TAG + 2] * (row < down - 1))
        return Piece([*tokens, *marks(END)], self.extras(1 + down * across, generator))


class Idefics2(TinyFamily):
    name = model_type = "idefics2"
    model_class = "Idefics2ForConditionalGeneration"
    per_row = ("pixel_values", "pixel_attention_mask")
    notes = (
        "8 latents of a perceiver for each image or tile: they have an order but no places; image "
        "1 is split into 4 tiles, the whole last; images are padded; no get_placeholder_mask; "
        "text_model"
    )
    shapes = ((28, 42), (28, 28), (42, 28))

    def config(self) -> Any:
        return hf.Idefics2Config(
            vision_config=hf.Idefics2VisionConfig(**vision_settings(42)).to_dict(),
            perceiver_config={
                "hidden_size": 32,
                "resampler_n_latents": 8,
                "resampler_depth": 2,
                "resampler_n_heads": 4,
                "resampler_head_dim": 8,
                "num_key_value_heads": 2,
            },
            text_config=hf.MistralConfig(**text_settings(head_dim=8, sliding_window=None)),
            image_token_id=IMAGE,
            tie_word_embeddings=False,
        )

    def image(self, which: int, generator: torch.Generator, count: int) -> Piece:
        crops: list[int | None] = [1, 2, 3, 4, 0] if which == 1 else [None]
        tokens = marks(START, kind="text")
        for crop in crops:
            tokens += [*cells(1, 8, crop=crop), *marks(START, kind="text")]
        height, width = self.shapes[which]
        extras = {
            "pixel_values": pixels(generator, 1, len(crops), 3, height, width),
            "pixel_attention_mask": torch.ones(1, len(crops), height, width, dtype=torch.long),
        }
        return Piece(tokens, extras)

    def join(self, name: str, values: Sequence[Tensor]) -> Tensor:
        return join(values, dim=1)


class FastVLM(OneGrid):
    name = model_type = "fast_vlm"
    model_class = "FastVlmForConditionalGeneration"
    side_pixels = 256
    notes = "a convolutional tower of timm, its last map one token per place"

    def config(self) -> Any:
        return hf.FastVlmConfig(
            vision_config={
                "model_type": "timm_wrapper",
                "architecture": "fastvit_mci3",
                "do_pooling": True,
                "hidden_size": 64,
                "model_args": {
                    "layers": [1, 1, 1, 1, 2],
                    "embed_dims": [8, 8, 16, 32, 32],
                    "inference_mode": True,
                },
            },
            text_config=hf.Qwen2Config(**text_settings()),
            image_token_index=IMAGE,
            image_seq_length=16,
        )


class PerceptionLM(Tiled):
    name = model_type = "perception_lm"
    model_class = "PerceptionLMForConditionalGeneration"
    has_video = True
    tiling = ((1, 2), (2, 1), (1, 2))
    notes = (
        "a timm tower with [CLS], pooled by 2; the thumbnail first, nothing between tiles; the "
        "model cannot batch images of unequal numbers of tiles"
    )

    def config(self) -> Any:
        return hf.PerceptionLMConfig(
            vision_config={
                "model_type": "timm_wrapper",
                "architecture": "vit_pe_core_tiny_patch16_384",
                "do_pooling": True,
                "hidden_size": 32,
                "model_args": {
                    "embed_dim": 32,
                    "img_size": [42, 42],
                    "patch_size": 7,
                    "depth": 2,
                    "num_heads": 4,
                    "global_pool": "",
                    "use_post_transformer_norm": False,
                    "init_values": 0.1,
                    "ref_feat_shape": [6, 6],
                },
            },
            text_config=hf.LlamaConfig(**text_settings()),
            projector_pooling_ratio=2,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
        )

    def image(self, which: int, generator: torch.Generator, count: int) -> Piece:
        tokens = [cell for crop in range(3) for cell in self.tile(crop)]
        return Piece(tokens, {"pixel_values": pixels(generator, 1, 3, 3, 42, 42)})

    def video(self, which: int, generator: torch.Generator) -> Piece:
        tokens = [cell for f in range(3) for cell in cells(3, 3, frame=f, token=VIDEO)]
        clip = pixels(generator, 1, 3, 3, 42, 42)
        return Piece(tokens, {"pixel_values_videos": clip}, video=True)


class Gemma3n(OneGrid):
    model_type = "gemma3n"
    model_class = "Gemma3nForConditionalGeneration"
    words_end = 112
    image_id, eoi_id = 113, 112
    side_pixels = 128
    never = (*TinyFamily.never, *range(112, VOCABULARY))

    def __init__(self, name: str, window: int) -> None:
        self.name = name
        self.window = window
        self.notes = (
            "inputs of its own for every layer, made from the ids; two streams of hidden states "
            "(AltUp), so that layers take (2, b, s, d); keys and values of the last two layers are "
            f"shared; causal; sliding window of {window}; the tower is timm's test_efficientnet "
            "in place of MobileNet, which cannot be made small; ids from 112 have embeddings in "
            "embed_vision, from 120 in embed_audio"
        )

    def config(self) -> Any:
        return hf.Gemma3nConfig(
            text_config=hf.Gemma3nTextConfig(
                **text_settings(
                    head_dim=8,
                    sliding_window=self.window,
                    layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
                ),
                vocab_size_per_layer_input=112,
                hidden_size_per_layer_input=8,
                altup_num_inputs=2,
                laurel_rank=4,
                num_kv_shared_layers=2,
                activation_sparsity_pattern=[0.5, 0.5, 0.0, 0.0, 0.0, 0.0],
            ),
            vision_config=hf.Gemma3nVisionConfig(
                architecture="test_efficientnet",
                hidden_size=256,
                vocab_size=8,
                vocab_offset=112,
            ),
            audio_config=hf.Gemma3nAudioConfig(
                vocab_size=8,
                vocab_offset=120,
                input_feat_size=16,
                hidden_size=16,
                conf_num_attention_heads=2,
                conf_num_hidden_layers=1,
                sscp_conv_channel_size=(4, 4),
            ),
            vision_soft_tokens_per_image=16,
            boi_token_id=START,
            eoi_token_id=self.eoi_id,
            image_token_id=self.image_id,
            boa_token_id=TAG,
            eoa_token_id=120,
            audio_token_id=121,
            tie_word_embeddings=False,
        )

    def image(self, which: int, generator: torch.Generator, count: int) -> Piece:
        tokens = [*marks(START, kind="text"), *cells(4, 4, token=self.image_id)]
        tokens += marks(self.eoi_id, kind="text")
        return Piece(tokens, {"pixel_values": torch.rand(1, 3, 128, 128, generator=generator)})


# ---- Q-Former: one image a row, and a generate of their own -------------------------------------
class Blip2(OneGrid):
    name = "blip_2"
    model_type = "blip-2"
    model_class = "Blip2ForConditionalGeneration"
    layouts: ClassVar = {"text": ()}
    notes = (
        "its forward takes no batch without images; 16 queries have no places, grid counts them "
        "as columns; generate is its own and calls the language model's"
    )

    def settings(self) -> dict[str, Any]:
        return {
            "vision_config": vision_settings(28),
            "qformer_config": {
                "vocab_size": VOCABULARY,
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 48,
                "encoder_hidden_size": 32,
                "cross_attention_frequency": 1,
            },
            "num_query_tokens": 16,
            "image_token_index": IMAGE,
        }

    def config(self) -> Any:
        text = hf.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            word_embed_proj_dim=32,
            max_position_embeddings=512,
            pad_token_id=PAD,
            bos_token_id=1,
            eos_token_id=None,
            tie_word_embeddings=False,
        )
        return hf.Blip2Config(text_config=text.to_dict(), **self.settings())

    def collate(self, rows: Sequence[Row], side: str = "left") -> dict[str, Tensor]:
        batch = super().collate(rows, side)
        batch.setdefault("pixel_values", torch.zeros(1, 3, 28, 28))  # it must be given
        return batch

    def image(self, which: int, generator: torch.Generator, count: int) -> Piece:
        return Piece(cells(1, 16), {"pixel_values": pixels(generator, 1, 3, 28, 28)})


class InstructBlip(Blip2):
    name = model_type = "instructblip"
    model_class = "InstructBlipForConditionalGeneration"
    max_images = 1
    layouts: ClassVar = {"mixed": (), "text": ()}
    per_row = ("qformer_input_ids", "qformer_attention_mask")
    notes = Blip2.notes + "; every row has an image: the Q-Former reads the question too"

    def config(self) -> Any:
        text = hf.LlamaConfig(**text_settings())
        return hf.InstructBlipConfig(text_config=text.to_dict(), **self.settings())

    def finish(self, input_ids: Tensor, images: int, extras: dict[str, Tensor]) -> None:
        words = input_ids[input_ids != IMAGE][None]
        extras["qformer_input_ids"] = words
        extras["qformer_attention_mask"] = torch.ones_like(words)


# ---- cross-attention ----------------------------------------------------------------------------
class Mllama(TinyFamily):
    name = model_type = "mllama"
    model_class = "MllamaForConditionalGeneration"
    per_token = ("cross_attention_mask",)
    per_row = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_mask")
    tiling = ((1, 2), (2, 1), (1, 1))
    notes = (
        "no vision token in the sequence, where one text token stands for an image: index is "
        "empty, and grid and crop tell of the cross-attention states, tile by tile, without the "
        "[CLS] that begins each tile and without tiles of padding. Where the mask leaves a text "
        "token no image (before the first, or in a row of text), transformers gives it the mean of "
        "all, padding included, and drops only the layer's MLP: so such tokens depend on how many "
        "images their batch-mates have"
    )
    unstable = ("images", "mixed")

    def config(self) -> Any:
        return hf.MllamaConfig(
            vision_config=hf.MllamaVisionConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_global_layers=1,
                attention_heads=4,
                image_size=28,
                patch_size=7,
                max_num_tiles=2,
                supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
                intermediate_layers_indices=[0, 1],
                vision_output_dim=96,
            ),
            text_config=hf.MllamaTextConfig(
                **text_settings(), cross_attention_layers=[1, 4], rope_parameters=None
            ),
            image_token_index=IMAGE,
        )

    def image(self, which: int, generator: torch.Generator, count: int) -> Piece:
        down, across = self.tiling[which]
        tiles = down * across
        values = torch.zeros(1, 1, 2, 3, 28, 28)
        values[:, :, :tiles] = pixels(generator, 1, 1, tiles, 3, 28, 28)
        extras = {
            "pixel_values": values,
            "aspect_ratio_ids": torch.tensor([[1 + self.ratios.index((down, across))]]),
            "aspect_ratio_mask": (torch.arange(2) < tiles).long()[None, None],
        }
        aside: list[Any] = []
        for tile in range(tiles):
            crop = tile + 1 if tiles > 1 else None
            aside += [cell for _, cell in cells(4, 4, crop=crop)]
        return Piece(marks(IMAGE, kind="text"), extras, aside=aside)

    ratios = ((1, 1), (1, 2), (2, 1))

    def join(self, name: str, values: Sequence[Tensor]) -> Tensor:
        return join(values, dim=1)

    def collate(self, rows: Sequence[Row], side: str = "left") -> dict[str, Tensor]:
        batch = super().collate(rows, side)
        if "aspect_ratio_mask" in batch:
            batch["aspect_ratio_mask"][:, :, 0] = 1  # as the image processor does for padding
        return batch

    def finish(self, input_ids: Tensor, images: int, extras: dict[str, Tensor]) -> None:
        if not images:
            return
        places = (input_ids == IMAGE).nonzero()[:, 0].tolist()
        mask = torch.zeros(1, input_ids.numel(), images, 2, dtype=torch.long)
        end = input_ids.numel()
        for i in reversed(range(images)):
            # Images that stand side by side are seen by the same text.
            mask[0, places[i] : end, i] = extras["aspect_ratio_mask"][0, i]
            if i and places[i] - places[i - 1] > 1:
                end = places[i]
        extras["cross_attention_mask"] = mask


register(
    VideoLlava(),
    DeepseekVL(),
    DeepseekVLHybrid(),
    GotOcr2(),
    Ovis2(),
    Idefics2(),
    FastVLM(),
    PerceptionLM(),
    Gemma3n("gemma3n", 400),
    Gemma3n("gemma3n_short", 12),
    Blip2(),
    InstructBlip(),
    Mllama(),
)
