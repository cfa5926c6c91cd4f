# SPDX-License-Identifier: Apache-2.0
"""More of `tests.reference.families`: grids of any size, and families of a shape of their own."""

from __future__ import annotations

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


# ---- grids of any size --------------------------------------------------------------------------
class Mistral3(TinyFamily):
    name = model_type = "mistral3"
    model_class = "Mistral3ForConditionalGeneration"
    notes = "a break token after each row but the last, an end token after that; images are padded"
    grids = ((4, 5), (3, 4), (2, 6))

    def config(self) -> Any:
        return hf.Mistral3Config(
            vision_config=hf.PixtralVisionConfig(**vision_settings(70)),
            text_config=hf.MistralConfig(**text_settings(head_dim=8, sliding_window=None)),
            image_token_index=IMAGE,
            vision_feature_layer=-1,
            tie_word_embeddings=False,
        )

    def image(self, which: int, generator: torch.Generator, count: int) -> Piece:
        rows, columns = self.grids[which]
        tokens: list[Any] = []
        for r in range(rows):
            tokens += [(IMAGE, (0, r, c, None)) for c in range(columns)]
            tokens += marks(TAG if r < rows - 1 else END)
        height, width = rows * 14, columns * 14
        extras = {
            "pixel_values": pixels(generator, 1, 3, height, width),
            "image_sizes": long(height, width),
        }
        return Piece(tokens, extras)


# ---- m-RoPE -------------------------------------------------------------------------------------
class Qwen2VL(TinyFamily):
    """Packed patches in the order of 2x2 blocks; positions of three dimensions."""

    name = model_type = "qwen2_vl"
    model_class = "Qwen2VLForConditionalGeneration"
    has_video = True
    per_token: tuple[str, ...] = ("mm_token_type_ids",)
    grids = ((4, 5), (3, 4), (2, 6))
    notes = "m-RoPE; start and end tokens around an image are text; packed vision attention"
    patch = 4

    def config(self) -> Any:
        return hf.Qwen2VLConfig(
            vision_config={
                "depth": 2,
                "embed_dim": 32,
                "hidden_size": 32,
                "num_heads": 4,
                "mlp_ratio": 2,
                "patch_size": self.patch,
            },
            text_config=text_settings(rope_parameters=self.rope()),
            **self.tokens(),
        )

    def rope(self, **more: Any) -> dict[str, Any]:
        return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], **more}

    def tokens(self) -> dict[str, Any]:
        return {
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "vision_start_token_id": START,
            "vision_end_token_id": END,
            "tie_word_embeddings": False,
        }

    def patches(self, generator: torch.Generator, frames: int, rows: int, columns: int) -> Tensor:
        return pixels(generator, frames * 4 * rows * columns, 3 * 2 * self.patch**2)

    def image(self, which: int, generator: torch.Generator, count: int) -> Piece:
        rows, columns = self.grids[which]
        tokens = [*marks(START, kind="text"), *cells(rows, columns), *marks(END, kind="text")]
        extras = {
            "pixel_values": self.patches(generator, 1, rows, columns),
            "image_grid_thw": long(1, 2 * rows, 2 * columns),
        }
        return Piece(tokens, extras)

    def video(self, which: int, generator: torch.Generator) -> Piece:
        frames, rows, columns = ((3, 2, 3), (4, 2, 2))[which]
        tokens = self.clip(frames, rows, columns)
        extras = {
            "pixel_values_videos": self.patches(generator, frames, rows, columns),
            "video_grid_thw": long(frames, 2 * rows, 2 * columns),
        }
        return Piece(tokens, extras, video=True)

    def clip(self, frames: int, rows: int, columns: int) -> list[Any]:
        tokens = marks(START, kind="text")
        for f in range(frames):
            tokens += cells(rows, columns, frame=f, token=VIDEO)
        return [*tokens, *marks(END, kind="text")]

    def finish(self, input_ids: Tensor, images: int, extras: dict[str, Tensor]) -> None:
        kinds = (input_ids == IMAGE).long() + 2 * (input_ids == VIDEO).long()
        extras["mm_token_type_ids"] = kinds[None]


class Qwen25VL(Qwen2VL):
    name = model_type = "qwen2_5_vl"
    model_class = "Qwen2_5_VLForConditionalGeneration"
    notes = Qwen2VL.notes + " in windows, whose order is undone; frames are 2 seconds apart"

    def config(self) -> Any:
        return hf.Qwen2_5_VLConfig(
            vision_config={
                "depth": 2,
                "hidden_size": 32,
                "out_hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 4,
                "patch_size": self.patch,
                "window_size": 16,
                "fullatt_block_indexes": [1],
                "tokens_per_second": 2,
            },
            text_config=text_settings(rope_parameters=self.rope()),
            **self.tokens(),
        )

    def video(self, which: int, generator: torch.Generator) -> Piece:
        piece = super().video(which, generator)
        piece.extras["second_per_grid_ts"] = torch.tensor([2.0])
        return piece


class Qwen3VL(Qwen2VL):
    name = model_type = "qwen3_vl"
    model_class = "Qwen3VLForConditionalGeneration"
    notes = (
        "interleaved m-RoPE; deep features are added to vision tokens after the first two layers; "
        "a timestamp and start and end tokens around each frame of a clip"
    )

    def vision(self) -> dict[str, Any]:
        return {
            "depth": 3,
            "hidden_size": 32,
            "out_hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": self.patch,
            "num_position_embeddings": 64,
        }

    def config(self) -> Any:
        return hf.Qwen3VLConfig(
            vision_config={**self.vision(), "deepstack_visual_indexes": [0, 1]},
            text_config=text_settings(
                head_dim=8, rope_parameters=self.rope(mrope_interleaved=True)
            ),
            **self.tokens(),
        )

    def clip(self, frames: int, rows: int, columns: int) -> list[Any]:
        tokens: list[Any] = []
        for f in range(frames):
            tokens += marks(TAG + 1 + f, TAG, START, kind="text")
            tokens += [*cells(rows, columns, frame=f, token=VIDEO), *marks(END, kind="text")]
        return tokens


class Qwen35(Qwen3VL):
    name = model_type = "qwen3_5"
    model_class = "Qwen3_5ForConditionalGeneration"
    notes = (
        "layers 0, 1, 3 and 4 are linear attention with a recurrent state and a convolution; "
        "m-RoPE on a part of each head; no deep features; clips as qwen3_vl"
    )

    def config(self) -> Any:
        return hf.Qwen3_5Config(
            vision_config=self.vision(),
            text_config=text_settings(
                head_dim=16,
                # The norm behind the recurrent state blows up what is nearly zero, and rounding
                # with it (with 1e-3, sdpa to 1.8e-4, and in float64 to 2e-6); a larger epsilon
                # bounds that.
                rms_norm_eps=1e-2,
                rope_parameters=self.rope(mrope_interleaved=True, partial_rotary_factor=0.5),
                layer_types=["linear_attention", "linear_attention", "full_attention"] * 2,
                linear_key_head_dim=8,
                linear_value_head_dim=8,
                linear_num_key_heads=2,
                linear_num_value_heads=4,
            ),
            **self.tokens(),
        )


class Glm4v(Qwen2VL):
    name = model_type = "glm4v"
    model_class = "Glm4vForConditionalGeneration"
    notes = (
        "m-RoPE on half of each head; frames of a clip hold the image token, so that the model "
        "itself cannot take images and clips in one batch"
    )
    layouts: ClassVar = {
        "video": ((2, "video0", 7), (4, "video1", 3), (1, "video0", 4, "video1", 3))
    }

    def marks(self) -> dict[str, Any]:
        tokens = self.tokens()
        del tokens["vision_start_token_id"], tokens["vision_end_token_id"]
        return tokens | {
            "image_start_token_id": START,
            "image_end_token_id": END,
            "video_start_token_id": TAG,
            "video_end_token_id": TAG + 1,
        }

    def config(self) -> Any:
        return hf.Glm4vConfig(
            vision_config={
                "depth": 2,
                "hidden_size": 32,
                "out_hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 4,
                "patch_size": self.patch,
                "image_size": 32,
            },
            text_config=text_settings(
                head_dim=16, rope_parameters=self.rope(partial_rotary_factor=0.5)
            ),
            **self.marks(),
        )

    def clip(self, frames: int, rows: int, columns: int) -> list[Any]:
        tokens = marks(TAG, kind="text")
        for f in range(frames):
            tokens += [*marks(START, kind="text"), *cells(rows, columns, frame=f)]
            tokens += marks(END, TAG + 2 + f, kind="text")
        return [*tokens, *marks(TAG + 1, kind="text")]

    def finish(self, input_ids: Tensor, images: int, extras: dict[str, Tensor]) -> None:
        inside = (input_ids == TAG).cumsum(0) > (input_ids == TAG + 1).cumsum(0)
        kinds = (input_ids == IMAGE).long() * torch.where(inside, 2, 1)
        extras["mm_token_type_ids"] = kinds[None]


class Qwen3VLMoe(Qwen3VL):
    name = model_type = "qwen3_vl_moe"
    model_class = "Qwen3VLMoeForConditionalGeneration"
    notes = Qwen3VL.notes + "; a mixture of experts"

    def config(self) -> Any:
        return hf.Qwen3VLMoeConfig(
            vision_config={**self.vision(), "deepstack_visual_indexes": [0, 1]},
            text_config=text_settings(
                head_dim=8,
                rope_parameters=self.rope(mrope_interleaved=True),
                moe_intermediate_size=16,
                num_experts=4,
                num_experts_per_tok=2,
            ),
            **self.tokens(),
        )


class Glm4vMoe(Glm4v):
    name = model_type = "glm4v_moe"
    model_class = "Glm4vMoeForConditionalGeneration"
    notes = Glm4v.notes + "; a mixture of experts behind the first layer"

    def config(self) -> Any:
        dense = super().config()
        vision = dense.vision_config.to_dict()
        text = dense.text_config.to_dict()
        del vision["model_type"], text["model_type"]
        more = {
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "tie_word_embeddings": False,
        }
        return hf.Glm4vMoeConfig(vision_config=vision, text_config=text | more, **self.marks())


class Glm46V(Glm4v):
    name = model_type = "glm46v"
    model_class = "Glm46VForConditionalGeneration"
    notes = Glm4v.notes + "; GLM-4.1V's tower and decoder"

    def config(self) -> Any:
        dense = super().config()
        return hf.Glm46VConfig(
            vision_config=dense.vision_config, text_config=dense.text_config, **self.marks()
        )


class KimiK25(Qwen2VL):
    name = model_type = "kimi_k25"
    model_class = "Kimi_K25ForConditionalGeneration"
    per_token = ()
    notes = (
        "latent attention (MLA) and a mixture of experts; positions of one dimension; frames of a "
        "chunk are averaged, so that a clip has one frame per chunk, with text between"
    )

    def config(self) -> Any:
        return hf.Kimi_K25Config(
            vision_config={
                "patch_size": self.patch,
                "pos_emb_height": 8,
                "pos_emb_width": 8,
                "num_attention_heads": 4,
                "num_hidden_layers": 2,
                "hidden_size": 32,
                "intermediate_size": 48,
            },
            text_config=hf.DeepseekV3Config(
                **text_settings(num_key_value_heads=4),
                moe_intermediate_size=16,
                n_routed_experts=4,
                num_experts_per_tok=2,
                n_group=1,
                topk_group=1,
                first_k_dense_replace=4,
                q_lora_rank=16,
                kv_lora_rank=16,
                qk_rope_head_dim=4,
                qk_nope_head_dim=8,
                v_head_dim=8,
                num_mtp_layers=0,
            ),
            projection_hidden_size=32,
            **self.tokens(),
        )

    def patches(self, generator: torch.Generator, frames: int, rows: int, columns: int) -> Tensor:
        return pixels(generator, frames * 4 * rows * columns, 3, self.patch, self.patch)

    def video(self, which: int, generator: torch.Generator) -> Piece:
        chunks, rows, columns = ((3, 2, 3), (4, 2, 2))[which]
        tokens: list[Any] = []
        for f in range(chunks):
            tokens += marks(TAG + 2 + f, START, TAG, TAG + 1, kind="text")
            tokens += [*cells(rows, columns, frame=f, token=VIDEO), *marks(END, kind="text")]
        extras = {
            "pixel_values_videos": self.patches(generator, 4 * chunks, rows, columns),
            "video_grid_thw": torch.tensor([[4, 2 * rows, 2 * columns]] * chunks),
        }
        return Piece(tokens, extras, video=True)

    def finish(self, input_ids: Tensor, images: int, extras: dict[str, Tensor]) -> None:
        return


class Gemma4(TinyFamily):
    """Gemma 4 without audio: the dense model, or the small one for devices."""

    model_type = "gemma4"
    model_class = "Gemma4ForConditionalGeneration"
    has_video = True
    per_token = ("mm_token_type_ids",)
    grids = ((4, 5), (3, 4), (2, 6))

    def __init__(self, name: str, window: int, device: bool = False) -> None:
        self.name, self.window, self.device = name, window, device
        what = (
            "inputs of its own for every layer, made from the ids; keys and values of the last "
            "two layers are shared; causal images"
            if device
            else "images attend in both directions; keys are values in full layers, whose heads "
            "are larger; a mixture of experts"
        )
        self.notes = f"{what}; sliding window of {window}; patches padded with positions -1"

    def config(self) -> Any:
        kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
        settings = text_settings(
            head_dim=8,
            global_head_dim=16,
            sliding_window=self.window,
            layer_types=kinds,
            rms_norm_eps=1e-3,  # bounds how much norms of small gates blow up rounding
        )
        if self.device:
            settings |= {
                "hidden_size_per_layer_input": 8,
                "vocab_size_per_layer_input": VOCABULARY,
                "num_kv_shared_layers": 2,
            }
        else:
            settings |= {
                "hidden_size_per_layer_input": 0,
                "use_bidirectional_attention": "vision",
                "attention_k_eq_v": True,
                "num_global_key_value_heads": 1,
                "enable_moe_block": True,
                "num_experts": 4,
                "top_k_experts": 2,
                "moe_intermediate_size": 16,
            }
        return hf.Gemma4Config(
            text_config=hf.Gemma4TextConfig(**settings),
            vision_config=hf.Gemma4VisionConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=4,
                head_dim=8,
                patch_size=4,
                pooling_kernel_size=2,
                position_embedding_size=64,
            ),
            audio_config=None,
            boi_token_id=START,
            eoi_token_id=END,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            audio_token_id=TAG + 16,
            tie_word_embeddings=False,
        )

    def patches(
        self, generator: torch.Generator, rows: int, columns: int, most: int
    ) -> tuple[Tensor, Tensor]:
        """(1, 4 most, 48) patches in raster order and (1, 4 most, 2) their (x, y)."""
        count = 4 * rows * columns
        values, places = torch.zeros(1, 4 * most, 48), torch.full((1, 4 * most, 2), -1)
        values[:, :count] = torch.rand(1, count, 48, generator=generator)
        raster = torch.arange(count)
        places[0, :count] = torch.stack([raster % (2 * columns), raster // (2 * columns)], dim=1)
        return values, places

    def image(self, which: int, generator: torch.Generator, count: int) -> Piece:
        rows, columns = self.grids[which]
        tokens = [*marks(START, kind="text"), *cells(rows, columns), *marks(END, kind="text")]
        values, places = self.patches(generator, rows, columns, 20)
        return Piece(tokens, {"pixel_values": values, "image_position_ids": places})

    def video(self, which: int, generator: torch.Generator) -> Piece:
        frames, rows, columns = ((3, 2, 3), (4, 2, 2))[which]
        tokens: list[Any] = []
        values, places = [], []
        for f in range(frames):
            tokens += marks(TAG + 1 + f, START, kind="text")
            tokens += [*cells(rows, columns, frame=f, token=VIDEO), *marks(END, kind="text")]
            patches = self.patches(generator, rows, columns, 8)
            values.append(patches[0])
            places.append(patches[1])
        extras = {
            "pixel_values_videos": torch.cat(values),
            "video_position_ids": torch.cat(places),
            "num_frames_per_video": torch.tensor([frames]),
        }
        return Piece(tokens, extras, video=True)

    def finish(self, input_ids: Tensor, images: int, extras: dict[str, Tensor]) -> None:
        kinds = (input_ids == IMAGE).long() + 2 * (input_ids == VIDEO).long()
        extras["mm_token_type_ids"] = kinds[None]


register(
    Mistral3(),
    Qwen2VL(),
    Qwen25VL(),
    Qwen3VL(),
    Qwen3VLMoe(),
    Qwen35(),
    Glm4v(),
    Glm4vMoe(),
    Glm46V(),
    KimiK25(),
    Gemma4("gemma4", 400),
    Gemma4("gemma4_short", 12),
    Gemma4("gemma4_device", 400, device=True),
    Gemma4("gemma4_device_short", 12, device=True),
)
