# SPDX-License-Identifier: Apache-2.0
"""More of `tests.reference.families`: HunYuan-VL, Granite 4 Vision, Granite-Docling,
Molmo 2, Step 3.7, Cohere Compass, Cosmos 3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import transformers as hf
from torch import Tensor
from torch.nn import functional

from tests.reference.families import (
    BOS,
    END,
    IMAGE,
    PAD,
    START,
    TAG,
    VIDEO,
    Piece,
    Row,
    TinyFamily,
    cells,
    long,
    marks,
    pixels,
    register,
    text_settings,
    vision_settings,
)
from tests.reference.families_more import Gemma3, Idefics3, LlavaNext
from tests.reference.families_rest import Gemma4, Mistral3, Qwen2VL, Qwen3VL


class HunYuanVL(Qwen2VL):
    model_type = "hunyuan_vl"
    model_class = "HunYuanVLForConditionalGeneration"
    has_video = False

    def __init__(self, name: str, sections: list[int]) -> None:
        self.name, self.sections = name, sections
        counts = sections[-1] > 0
        # Norms behind the rotation make positions absolute, and text alone counts its padding.
        self.unstable = ("text", *(("ragged", "images", "mixed") if counts else ()))
        self.notes = (
            "features begin and end an image and end each of its rows; patches in raster order; "
            f"m-RoPE with {len(sections)} axes, of which the last counts the images of the whole "
            f"batch{'' if counts else ' and has no part of a head'}"
        )

    def config(self) -> Any:
        return hf.HunYuanVLConfig(
            vision_config=vision_settings(64, self.patch, max_image_size=64),
            text_config=text_settings(
                head_dim=8,
                rope_parameters={
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "mrope_section": self.sections,
                },
            ),
            image_token_id=IMAGE,
            im_start_id=START,
            im_end_id=END,
            im_newline_id=TAG,
            tie_word_embeddings=False,
        )

    def image(self, which: int, generator: torch.Generator, count: int) -> Piece:
        rows, columns = self.grids[which]
        tokens = [*marks(START, kind="text"), *marks(IMAGE)]
        for r in range(rows):
            tokens += [(IMAGE, (0, r, c, None)) for c in range(columns)]
            tokens += marks(IMAGE)
        tokens += [*marks(IMAGE), *marks(END, kind="text")]
        extras = {
            "pixel_values": pixels(generator, 4 * rows * columns, 3 * self.patch**2),
            "image_grid_thw": long(1, 2 * rows, 2 * columns),
        }
        return Piece(tokens, extras)


# ---- features between decoder layers ------------------------------------------------------------
class Granite4Vision(LlavaNext):
    name = model_type = "granite4_vision"
    model_class = "Granite4VisionForConditionalGeneration"
    sizes = ((56, 112), (112, 80), (56, 56))
    tile, patch = 4, 7
    planes: ClassVar = {(56, 112): (1, 2, 0, 0), (112, 80): (2, 2, 0, 1), (56, 56): (1, 2, 0, 2)}
    notes = (
        "as llava_next, with tiles of 4x4 tokens from windows of 4x4 of 8x8 patches; vision tokens "
        "enter as zeros, and features are added before layers 0, 1, 2, 3 and 5"
    )

    def config(self) -> Any:
        vision = vision_settings(56, self.patch) | {"hidden_size": 64, "num_hidden_layers": 3}
        return hf.Granite4VisionConfig(
            vision_config=hf.SiglipVisionConfig(**vision),
            text_config=text_settings(
                embedding_multiplier=2.0, residual_multiplier=0.8, attention_multiplier=0.3
            ),
            qformer_config={
                "model_type": "blip_2_qformer",
                "num_hidden_layers": 1,
                "intermediate_size": 48,
                "cross_attention_frequency": 1,
                "use_qformer_text_input": False,
            },
            image_token_index=IMAGE,
            image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]],
            vision_feature_select_strategy="full",
            downsample_rate="2/4",
            deepstack_layer_map=[[-2, 2], [-1, 0]],
            spatial_vision_layer=-1,
            spatial_target_layers=[1, 3, 5],
            projector_dropout=0.0,
        )

    def image(self, which: int, generator: torch.Generator, count: int) -> Piece:
        piece = super().image(which, generator, count)
        tiles = piece.extras["pixel_values"].shape[1]
        return Piece(
            piece.tokens,
            {**piece.extras, "pixel_values": pixels(generator, 1, tiles, 3, 56, 56)},
        )


class GraniteDocling(Idefics3):
    model_type = "granite_docling"
    model_class = "GraniteDoclingForConditionalGeneration"
    per_row = ("pixel_values", "pixel_attention_mask", "tile_fine_mask")

    def __init__(self, name: str, fine: bool) -> None:
        self.name, self.fine = name, fine
        self.side = 6 if fine else 3
        self.notes = (
            "tiles as idefics3; deep features are added to vision tokens after the first two layers"
            f"; {'a token for each patch' if fine else 'four patches a token'}"
        )

    def config(self) -> Any:
        vision = vision_settings(42) | {"num_hidden_layers": 3}
        return hf.GraniteDoclingConfig(
            vision_config=vision
            | {
                "out_hidden_size": 32,
                "scale_factor": 2,
                "deepstack_visual_indexes": [0, 1],
            },
            text_config=text_settings(
                embedding_multiplier=2.0,
                logits_scaling=0.5,
                residual_multiplier=0.8,
                attention_multiplier=0.3,
            ),
            image_token_id=IMAGE,
            pad_token_id=PAD,
            tie_word_embeddings=False,
        )

    def extras(self, tiles: int, generator: torch.Generator) -> dict[str, Tensor]:
        size = self.side_pixels
        found = {
            "pixel_values": pixels(generator, 1, tiles, 3, size, size),
            "pixel_attention_mask": torch.ones(1, tiles, dtype=torch.bool),
        }
        return found | ({"tile_fine_mask": torch.ones(1, dtype=torch.bool)} if self.fine else {})

    def join(self, name: str, values: Sequence[Tensor]) -> Tensor:
        return values[0] if name == "tile_fine_mask" else super().join(name, values)


class CohereCompass(Qwen3VL):
    model_type = "cohere_compass"
    model_class = "CohereCompassForConditionalGeneration"

    def __init__(self, name: str, window: int) -> None:
        self.name, self.window = name, window
        self.notes = (
            f"{Qwen3VL.notes}; attention and MLP side by side; layers with a window of {window} "
            "rotate, the others do not"
        )

    def config(self) -> Any:
        return hf.CohereCompassConfig(
            vision_config={**self.vision(), "deepstack_visual_indexes": [0, 1]},
            text_config=text_settings(
                layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
                sliding_window=self.window,
                logit_scale=1.0,
                rope_parameters={"sliding_attention": self.rope(), "full_attention": None},
            ),
            **self.tokens(),
        )


class Cosmos3Omni(Qwen3VL):
    name = model_type = "cosmos3_omni"
    model_class = "Cosmos3OmniForConditionalGeneration"

    def config(self) -> Any:
        dense = super().config()
        return hf.Cosmos3OmniConfig(
            vision_config=dense.vision_config, text_config=dense.text_config, **self.tokens()
        )


class Cosmos3Edge(Qwen3VL):
    name = model_type = "cosmos3_edge"
    model_class = "Cosmos3EdgeForConditionalGeneration"
    notes = "interleaved m-RoPE; a tower with learned positions; clips as qwen3_vl"

    def config(self) -> Any:
        return hf.Cosmos3EdgeConfig(
            vision_config=vision_settings(32, self.patch, num_patches=64),
            text_config=text_settings(head_dim=8, rope_parameters=self.rope()),
            projector_hidden_size=48,
            **self.tokens(),
        )

    def patches(self, generator: torch.Generator, frames: int, rows: int, columns: int) -> Tensor:
        return pixels(generator, frames * 4 * rows * columns, 3 * self.patch**2)


# ---- images that see one another ----------------------------------------------------------------
class Molmo2(TinyFamily):
    name = model_type = "molmo2"
    model_class = "Molmo2ForConditionalGeneration"
    has_video = True
    per_token = ("mm_token_type_ids",)
    layouts: ClassVar = {"video": ((2, "video0", 7), (4, "video1", 3), (1, "video0", 4))}
    notes = (
        "a thumbnail and a plane of tiles of 5x5 patches, of which 2x2 become a token, fewer at "
        "the edge; an id starts and ends each and ends each row; all these see one another; not "
        "images and clips in one batch; some layers rotate by other angles"
    )
    side = 5
    planes = ((1, 2), (2, 1), (1, 1))

    def config(self) -> Any:
        return hf.Molmo2Config(
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "head_dim": 8,
                "patch_size": 2,
                "image_size": [10, 10],
            },
            adapter_config={
                "vision_feature_layer": [-1],
                "hidden_size": 32,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "head_dim": 8,
                "intermediate_size": 48,
                "text_hidden_size": 32,
            },
            text_config=text_settings(
                head_dim=8,
                additional_vocab_size=0,
                rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
                rope_scaling_layers=[1, 3, 4],
            ),
            image_start_token_id=START,
            image_end_token_id=END,
            low_res_image_start_token_id=TAG,
            image_patch_id=IMAGE,
            frame_start_token_id=TAG + 1,
            frame_end_token_id=TAG + 2,
            tie_word_embeddings=False,
        )

    def pooled(self, rows: int, columns: int, first: int, by: int) -> tuple[Tensor, int, int]:
        """The patches of each token of a plane of tiles, by ceil(side / by) a side."""
        side = self.side
        place = torch.arange(rows * columns * side * side).view(rows, columns, side, side)
        plane = place.transpose(1, 2).reshape(rows * side, columns * side) + first
        down, right = -(rows * side) % by, -(columns * side) % by
        plane = functional.pad(plane, (0, right, 0, down), value=-1)
        squares = plane.unfold(0, by, by).unfold(1, by, by)
        return squares.flatten(0, 1).flatten(1), *squares.shape[:2]

    def image(self, which: int, generator: torch.Generator, count: int) -> Piece:
        area, (down, across) = self.side**2, self.planes[which]
        low, *small = self.pooled(1, 1, 0, 2)
        high, *large = self.pooled(down, across, area, 2)
        tokens = marks(TAG, kind="text")
        for crop, (rows, columns), pool in ((0, small, low), (1, large, high)):
            for r in range(rows):
                for c in range(columns):
                    tile = crop and int(pool[r * columns + c].max()) // area
                    tokens.append((IMAGE, (0, r, c, tile)))
                tokens += marks(TAG + 3, kind="text")
            tokens += marks(END, *([] if crop else [START]), kind="text")
        tiles = 1 + down * across
        extras = {
            "pixel_values": pixels(generator, tiles, area, 12),
            "image_token_pooling": torch.cat([low, high]),
            "image_grids": long(*small, *large),
            "image_num_crops": torch.tensor([tiles]),
        }
        return Piece(tokens, extras)

    def video(self, which: int, generator: torch.Generator) -> Piece:
        frames, area = (2, 3)[which], self.side**2
        pools = [self.pooled(1, 1, frame * area, 2) for frame in range(frames)]
        _, rows, columns = pools[0]
        tokens: list[Any] = []
        for f in range(frames):
            tokens += [*marks(TAG + 4 + f, TAG + 1, kind="text"), *cells(rows, columns, frame=f)]
            tokens += marks(TAG + 2, kind="text")
        extras = {
            "pixel_values_videos": pixels(generator, frames, area, 12),
            "video_token_pooling": torch.cat([pool for pool, *_ in pools]),
            "video_grids": long(frames, rows, columns),
        }
        return Piece(tokens, extras, video=True)

    def join(self, name: str, values: Sequence[Tensor]) -> Tensor:
        if not name.endswith("token_pooling"):
            return super().join(name, values)
        # Patches are numbered through all tiles.
        found, first = [], 0
        for own in values:
            found.append(torch.where(own >= 0, own + first, -1))
            first += (int(own.max()) // self.side**2 + 1) * self.side**2
        return torch.cat(found)

    def collate(self, rows: Sequence[Row], side: str = "left") -> dict[str, Tensor]:
        batch = super().collate(rows, side)
        for name in ("image_token_pooling", "video_token_pooling"):
            if name in batch:
                own = [row.extras[name] for row in rows if name in row.extras]
                batch[name] = self.join(name, own)
        return batch

    def finish(self, input_ids: Tensor, images: int, extras: dict[str, Tensor]) -> None:
        kinds = (input_ids != BOS) & (input_ids < TAG + 4)
        extras["mm_token_type_ids"] = kinds.long()[None]


# ---- windows ------------------------------------------------------------------------------------
class Step3p7(TinyFamily):
    model_type = "step3p7"
    model_class = "Step3p7ForConditionalGeneration"
    tiles = (2, 3, 0)

    def __init__(self, name: str, window: int) -> None:
        self.name, self.window = name, window
        self.notes = (
            "tiles of 2x2 tokens between ids, then the picture of 3x3; a mixture of experts; "
            f"layers with a window of {window} have more heads and rotate by other angles"
        )

    def config(self) -> Any:
        kinds = ["full_attention", "sliding_attention", "sliding_attention"] * 2
        return hf.Step3p7Config(
            vision_config=vision_settings(48, 4, mlp_ratio=1.5),
            text_config=text_settings(
                head_dim=8,
                layer_types=kinds,
                mlp_layer_types=["dense"] * 2 + ["sparse"] * 4,
                num_sliding_attention_heads=6,
                sliding_window=self.window,
                n_routed_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=16,
                share_expert_dim=16,
                rope_parameters={
                    "full_attention": {
                        "rope_type": "default",
                        "rope_theta": 1e4,
                        "partial_rotary_factor": 0.5,
                    },
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
                },
            ),
            image_token_id=IMAGE,
            tie_word_embeddings=False,
        )

    def image(self, which: int, generator: torch.Generator, count: int) -> Piece:
        tiles = self.tiles[which]
        tokens: list[Any] = []
        for tile in range(tiles):
            tokens += [*marks(TAG, kind="text"), *cells(2, 2, crop=tile + 1)]
            tokens += marks(TAG + 1, *([TAG + 2] if tile == 1 else []), kind="text")
        tokens += [*marks(START, kind="text"), *cells(3, 3, crop=0 if tiles else None)]
        tokens += marks(END, kind="text")
        extras = {
            "pixel_values": pixels(generator, 1, 3, 48, 48),
            "num_local_patches": torch.tensor([tiles]),
        }
        if tiles:
            extras["pixel_values_local"] = pixels(generator, tiles, 3, 32, 32)
        return Piece(tokens, extras)


class Mistral4(Mistral3):
    name = "mistral3_mistral4"
    notes = (
        f"{Mistral3.notes}; latent attention (MLA), which scales queries by position, and experts"
    )

    def config(self) -> Any:
        dense = super().config()
        return hf.Mistral3Config(
            vision_config=dense.vision_config,
            text_config=hf.Mistral4Config(
                **text_settings(num_key_value_heads=4),
                moe_intermediate_size=16,
                n_routed_experts=4,
                num_experts_per_tok=2,
                first_k_dense_replace=4,
                q_lora_rank=16,
                kv_lora_rank=16,
                qk_rope_head_dim=4,
                qk_nope_head_dim=8,
                v_head_dim=8,
            ),
            image_token_index=IMAGE,
            vision_feature_layer=-1,
            tie_word_embeddings=False,
        )


# ---- relatives of Gemma -------------------------------------------------------------------------
class Gemma4Unified(Gemma4):
    model_type = "gemma4_unified"
    model_class = "Gemma4UnifiedForConditionalGeneration"

    def __init__(self, name: str, window: int) -> None:
        self.name, self.window, self.device = name, window, False
        self.notes = (
            f"no tower: a patch is a token; padded with positions -1; sliding window of {window}, "
            "which does not limit images; these attend in both directions in all layers"
        )

    def config(self) -> Any:
        text = super().config().text_config.to_dict()
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        names += ("num_attention_heads", "num_key_value_heads", "head_dim", "layer_types")
        names += ("sliding_window", "rms_norm_eps", "max_position_embeddings", "pad_token_id")
        return hf.Gemma4UnifiedConfig(
            text_config={name: text[name] for name in names}
            | {
                "bos_token_id": BOS,
                "eos_token_id": None,
                "tie_word_embeddings": False,
                "global_head_dim": 16,
                "num_global_key_value_heads": 1,
                "attention_k_eq_v": True,
            },
            vision_config={
                "patch_size": 2,
                "pooling_kernel_size": 2,
                "mm_embed_dim": 32,
                "mm_posemb_size": 16,
                "output_proj_dims": 32,
            },
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
        values, places = torch.zeros(1, most, 48), torch.full((1, most, 2), -1)
        values[:, : rows * columns] = torch.rand(1, rows * columns, 48, generator=generator)
        raster = torch.arange(rows * columns)
        places[0, : rows * columns] = torch.stack([raster % columns, raster // columns], dim=1)
        return values, places


class ShieldGemma2(Gemma3):
    model_type = "shieldgemma2"

    def config(self) -> Any:
        dense = super().config()
        return hf.ShieldGemma2Config(
            vision_config=dense.vision_config,
            text_config=dense.text_config,
            mm_tokens_per_image=16,
            boi_token_index=START,
            eoi_token_index=END,
            image_token_index=IMAGE,
            tie_word_embeddings=False,
            yes_token_index=30,
            no_token_index=31,
        )


# ---- a resampler --------------------------------------------------------------------------------
class DeepseekOcr2(TinyFamily):
    name = model_type = "deepseek_ocr2"
    model_class = "DeepseekOcr2ForConditionalGeneration"
    tiles = (0, 1, 0)
    notes = (
        "144 queries read the patches of each tile and of the picture behind them, a separator "
        "follows; a mixture of experts"
    )

    def config(self) -> Any:
        return hf.DeepseekOcr2Config(
            vision_config={
                "sam_config": {
                    "hidden_size": 16,
                    "output_channels": 16,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "image_size": 48,
                    "patch_size": 4,
                    "window_size": 4,
                    "global_attn_indexes": [1],
                    "mlp_dim": 32,
                    "downsample_channels": [16, 32],
                },
                "encoder_config": {
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                },
            },
            text_config=text_settings(
                max_position_embeddings=2048,
                n_routed_experts=4,
                n_shared_experts=1,
                num_experts_per_tok=2,
                moe_intermediate_size=16,
                mlp_layer_types=["dense"] + ["sparse"] * 5,
            ),
            image_token_id=IMAGE,
            tie_word_embeddings=False,
        )

    def image(self, which: int, generator: torch.Generator, count: int) -> Piece:
        tiles, tokens = self.tiles[which], []
        for crop in (*range(1, tiles + 1), 0):
            tokens += [(IMAGE, (0, 0, n, crop if tiles else None)) for n in range(144)]
        extras = {
            "pixel_values": pixels(generator, 1, 3, 56, 56),
            "num_local_patches": torch.tensor([tiles]),
        }
        if tiles:
            extras["pixel_values_local"] = pixels(generator, tiles, 3, 40, 40)
        return Piece([*tokens, *marks(IMAGE)], extras)


register(
    Mistral4(),
    Gemma4Unified("gemma4_unified", 400),
    Gemma4Unified("gemma4_unified_short", 12),
    ShieldGemma2("shieldgemma2", 400),
    DeepseekOcr2(),
    Cosmos3Omni(),
    Cosmos3Edge(),
    GraniteDocling("granite_docling", fine=False),
    GraniteDocling("granite_docling_fine", fine=True),
    CohereCompass("cohere_compass", 400),
    CohereCompass("cohere_compass_short", 12),
    Step3p7("step3p7", 400),
    Step3p7("step3p7_short", 12),
    Molmo2(),
    Granite4Vision(),
    HunYuanVL("hunyuan_vl", [1, 1, 2, 0]),
    HunYuanVL("hunyuan_vl_counting", [1, 1, 1, 1]),
)
