# SPDX-License-Identifier: Apache-2.0
"""More of `tests.reference.families`: relatives of families that have their own files."""

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
from tests.reference.families_more import InternVL
from tests.reference.families_own import GotOcr2
from tests.reference.families_rest import (
    Glm4v,
    Glm46V,
    Mistral3,
    Qwen2VL,
    Qwen3VL,
    Qwen25VL,
    Qwen35,
)


class Qwen35Moe(Qwen35):
    name = model_type = "qwen3_5_moe"
    model_class = "Qwen3_5MoeForConditionalGeneration"
    notes = Qwen35.notes + "; a mixture of experts"

    def config(self) -> Any:
        text = super().config().text_config.to_dict()
        del text["model_type"], text["intermediate_size"]
        more = {
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        }
        return hf.Qwen3_5MoeConfig(
            vision_config=self.vision(), text_config=text | more, **self.tokens()
        )


class GlmOcr(Glm4v):
    name = model_type = "glm_ocr"
    model_class = "GlmOcrForConditionalGeneration"
    notes = Glm4v.notes + "; norms in the tower's attention, no position embeddings"

    def config(self) -> Any:
        return hf.GlmOcrConfig(
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


# ---- with ears ----------------------------------------------------------------------------------
AUDIO = {
    "num_mel_bins": 8,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "d_model": 16,
    "output_dim": 32,
}
AUDIO_IDS = {"audio_token_id": TAG + 9, "audio_start_token_id": TAG + 10, "user_token_id": TAG + 12}


class Qwen25Omni(Qwen25VL):
    name = model_type = "qwen2_5_omni_thinker"
    model_class = "Qwen2_5OmniThinkerForConditionalGeneration"
    per_token = ()
    notes = Qwen25VL.notes + "; places are found from the ids; no audio here"

    def config(self) -> Any:
        vision = super().config().vision_config.to_dict()
        del vision["model_type"], vision["tokens_per_second"]
        return hf.Qwen2_5OmniThinkerConfig(
            vision_config=vision,
            text_config=text_settings(rope_parameters=self.rope()),
            audio_config=AUDIO,
            audio_end_token_id=TAG + 11,
            **AUDIO_IDS,
            **self.tokens(),
        )

    def video(self, which: int, generator: torch.Generator) -> Piece:
        piece = super().video(which, generator)
        piece.extras["video_second_per_grid"] = piece.extras.pop("second_per_grid_ts")
        return piece

    def finish(self, input_ids: Tensor, images: int, extras: dict[str, Tensor]) -> None:
        return


class Qwen3Omni(Qwen25Omni):
    name = model_type = "qwen3_omni_moe_thinker"
    model_class = "Qwen3OmniMoeThinkerForConditionalGeneration"
    notes = (
        "a mixture of experts; places are found from the ids; deep features as qwen3_vl; no "
        "timestamps between frames; no audio here"
    )

    def config(self) -> Any:
        return hf.Qwen3OmniMoeThinkerConfig(
            vision_config={**Qwen3VL().vision(), "deepstack_visual_indexes": [0, 1]},
            text_config=text_settings(
                head_dim=8,
                rope_parameters=self.rope(mrope_interleaved=True),
                moe_intermediate_size=16,
                num_experts=4,
                num_experts_per_tok=2,
            ),
            audio_config={**AUDIO, "downsample_hidden_size": 8},
            **AUDIO_IDS,
            **self.tokens(),
        )


# ---- convolutions between tokens ----------------------------------------------------------------
class Lfm2VL(TinyFamily):
    name = model_type = "lfm2_vl"
    model_class = "Lfm2VlForConditionalGeneration"
    notes = (
        "layers 0, 1, 3 and 4 are short convolutions; patches of images of any size, padded; 2x2 "
        "of them make a token; image 1 is split into two tiles, the whole last, with a tag before "
        "each"
    )
    grids: tuple[tuple[tuple[int, int], ...], ...] = (
        ((4, 5),),
        ((2, 3), (2, 3), (3, 4)),
        ((2, 6),),
    )

    def config(self) -> Any:
        return hf.Lfm2VlConfig(
            vision_config=hf.Siglip2VisionConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                patch_size=4,
                num_patches=16,
                vision_use_head=False,
            ),
            text_config=hf.Lfm2Config(
                **text_settings(), full_attn_idxs=[2, 5], block_auto_adjust_ff_dim=False
            ),
            image_token_id=IMAGE,
            projector_hidden_size=32,
            tie_word_embeddings=False,
        )

    def image(self, which: int, generator: torch.Generator, count: int) -> Piece:
        grids = self.grids[which]
        most = max(4 * rows * columns for rows, columns in grids)
        tokens = marks(START, kind="text")
        values, masks = torch.zeros(len(grids), most, 48), torch.zeros(len(grids), most).long()
        for i, (rows, columns) in enumerate(grids):
            crop = (i + 1) % len(grids) if len(grids) > 1 else None
            tokens += [*marks(TAG + i, kind="text"), *cells(rows, columns, crop=crop)]
            values[i, : 4 * rows * columns] = pixels(generator, 4 * rows * columns, 48)
            masks[i, : 4 * rows * columns] = 1
        extras = {
            "pixel_values": values,
            "pixel_attention_mask": masks,
            "spatial_shapes": 2 * torch.tensor(grids),
        }
        return Piece([*tokens, *marks(END, kind="text")], extras)


# ---- resampled ----------------------------------------------------------------------------------
class Aria(TinyFamily):
    name = model_type = "aria"
    model_class = "AriaForConditionalGeneration"
    notes = (
        "12 queries for each image or tile, which have an order but no places; image 1 is split "
        "into 2 tiles, the whole first; a mixture of experts"
    )

    def config(self) -> Any:
        return hf.AriaConfig(
            vision_config=hf.Idefics3VisionConfig(**vision_settings(28)),
            text_config=hf.AriaTextConfig(
                **text_settings(), moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1
            ),
            projector_patch_to_query_dict={16: 12},
            image_token_index=IMAGE,
        )

    def image(self, which: int, generator: torch.Generator, count: int) -> Piece:
        crops: list[int | None] = [0, 1, 2] if which == 1 else [None]
        tokens = marks(START, kind="text")
        for crop in crops:
            tokens += cells(1, 12, crop=crop)
        extras = {
            "pixel_values": pixels(generator, len(crops), 3, 28, 28),
            "pixel_mask": torch.ones(len(crops), 28, 28, dtype=torch.bool),
        }
        return Piece([*tokens, *marks(END, kind="text")], extras)


# ---- positions that count tokens, towers of any size --------------------------------------------
class Exaone45(Qwen25VL):
    name = model_type = "exaone4_5"
    model_class = "Exaone4_5_ForConditionalGeneration"
    per_token = ()
    notes = (
        "the tower of qwen2_5_vl with grouped keys; positions count tokens; windows in two of "
        "three layers, the others are not rotated"
    )
    window = 400

    def config(self) -> Any:
        vision = super().config().vision_config.to_dict()
        del vision["model_type"], vision["tokens_per_second"]
        tokens = self.tokens()
        del tokens["vision_start_token_id"], tokens["vision_end_token_id"]
        return hf.Exaone4_5_Config(
            vision_config=vision | {"num_key_value_heads": 2},
            text_config=hf.Exaone4Config(
                **text_settings(
                    sliding_window=self.window,
                    layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
                )
            ),
            **tokens,
        )

    def video(self, which: int, generator: torch.Generator) -> Piece:
        return Qwen2VL.video(self, which, generator)

    def finish(self, input_ids: Tensor, images: int, extras: dict[str, Tensor]) -> None:
        return


class HyperClovaX(Exaone45):
    name = model_type = "hyperclovax_vision_v2"
    model_class = "HyperCLOVAXVisionV2ForConditionalGeneration"
    notes = "the tower of qwen2_5_vl and one more linear layer; positions count tokens"

    def config(self) -> Any:
        vision = Qwen25VL.config(self).vision_config
        tokens = self.tokens()
        del tokens["vision_start_token_id"], tokens["vision_end_token_id"]
        return hf.HyperCLOVAXVisionV2Config(
            vision_config=vision, text_config=hf.HyperCLOVAXConfig(**text_settings()), **tokens
        )


class Lfm3VL(HyperClovaX):
    name = model_type = "lfm3_vl"
    model_class = "Lfm3VlForConditionalGeneration"
    notes = (
        "layers 0, 1, 3 and 4 of the language model are short convolutions, layer 2 has a window; "
        "positions count tokens; convolutions over the grid and attention take turns in the tower"
    )
    window = 400

    def config(self) -> Any:
        kinds = ["conv", "conv", "sliding_attention", "conv", "conv", "full_attention"]
        return hf.Lfm3VlConfig(
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "patch_size": self.patch,
                "layer_types": ["conv", "full_attention"] * 2,
            },
            text_config=hf.Lfm3Config(
                **text_settings(head_dim=8, sliding_window=self.window, layer_types=kinds)
            ),
            projector_hidden_size=32,
            **self.tokens(),
        )


class VideoLlama3(Qwen2VL):
    name = model_type = "video_llama_3"
    model_class = "VideoLlama3ForConditionalGeneration"
    per_token = ()
    notes = (
        "positions count tokens; patches of images are not joined, 2x2 of clips are averaged; no "
        "token compression of its own"
    )

    def config(self) -> Any:
        return hf.VideoLlama3Config(
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "patch_size": self.patch,
            },
            text_config=hf.Qwen2Config(**text_settings()),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
        )

    def image(self, which: int, generator: torch.Generator, count: int) -> Piece:
        rows, columns = self.grids[which]
        tokens = [*marks(START, kind="text"), *cells(rows, columns), *marks(END, kind="text")]
        extras = {
            "pixel_values": pixels(generator, rows * columns, 3 * self.patch**2),
            "image_grid_thw": long(1, rows, columns),
            "image_merge_sizes": torch.tensor([1]),
        }
        return Piece(tokens, extras)

    def patches(self, generator: torch.Generator, frames: int, rows: int, columns: int) -> Tensor:
        return pixels(generator, frames * 4 * rows * columns, 3 * self.patch**2)

    def video(self, which: int, generator: torch.Generator) -> Piece:
        piece = super().video(which, generator)
        piece.extras["video_merge_sizes"] = torch.tensor([2])
        return piece

    def clip(self, frames: int, rows: int, columns: int) -> list[Any]:
        tokens: list[Any] = []
        for f in range(frames):
            tokens += [*marks(TAG + f, kind="text"), *cells(rows, columns, frame=f, token=VIDEO)]
        return tokens

    def finish(self, input_ids: Tensor, images: int, extras: dict[str, Tensor]) -> None:
        return


class PaddleOCRVL(Qwen2VL):
    name = model_type = "paddleocr_vl"
    model_class = "PaddleOCRVLForConditionalGeneration"
    has_video = False
    notes = "m-RoPE; packed patches in raster order, 2x2 of which are joined"

    def config(self) -> Any:
        return hf.PaddleOCRVLConfig(
            vision_config=vision_settings(32, patch_size=self.patch),
            text_config=text_settings(head_dim=8, rope_parameters=self.rope()),
            **self.tokens(),
        )

    def patches(self, generator: torch.Generator, frames: int, rows: int, columns: int) -> Tensor:
        return pixels(generator, frames * 4 * rows * columns, 3, self.patch, self.patch)


class Ernie45VL(Qwen2VL):
    name = model_type = "ernie4_5_vl_moe"
    model_class = "Ernie4_5_VLMoeForConditionalGeneration"
    per_token = ("mm_token_type_ids", "moe_mm_token_type_ids")
    notes = (
        "m-RoPE; vision tokens, and the marks around images, have experts of their own; two frames "
        "of a clip become one"
    )

    def config(self) -> Any:
        tokens = {
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "image_start_token_id": START,
            "image_end_token_id": END,
            "video_start_token_id": TAG,
            "video_end_token_id": TAG + 1,
        }
        return hf.Ernie4_5_VLMoeConfig(
            vision_config={
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 4,
                "patch_size": self.patch,
            },
            text_config=text_settings(
                rope_parameters={
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "mrope_section": [1, 1, 2],
                },
                moe_intermediate_size=[16, 16],
                moe_num_experts=4,
                moe_k=2,
                moe_num_shared_experts=1,
            ),
            tie_word_embeddings=False,
            **tokens,
        )

    def patches(self, generator: torch.Generator, frames: int, rows: int, columns: int) -> Tensor:
        return pixels(generator, frames * 4 * rows * columns, 3 * self.patch**2)

    def video(self, which: int, generator: torch.Generator) -> Piece:
        frames, rows, columns = ((3, 2, 3), (4, 2, 2))[which]
        tokens = marks(TAG, kind="text")
        for f in range(frames):
            tokens += cells(rows, columns, frame=f, token=VIDEO)
        extras = {
            "pixel_values_videos": self.patches(generator, 2 * frames, rows, columns),
            "video_grid_thw": long(2 * frames, 2 * rows, 2 * columns),
        }
        return Piece([*tokens, *marks(TAG + 1, kind="text")], extras, video=True)

    def finish(self, input_ids: Tensor, images: int, extras: dict[str, Tensor]) -> None:
        super().finish(input_ids, images, extras)
        kinds = extras["mm_token_type_ids"][0].clone()
        kinds[(input_ids == START) | (input_ids == END)] = 1
        kinds[(input_ids == TAG) | (input_ids == TAG + 1)] = 2
        extras["moe_mm_token_type_ids"] = kinds[None]


# ---- as others ----------------------------------------------------------------------------------
class LightOnOcr(Mistral3):
    name = model_type = "lighton_ocr"
    model_class = "LightOnOcrForConditionalGeneration"
    notes = "as mistral3, without break tokens"

    def config(self) -> Any:
        return hf.LightOnOcrConfig(
            vision_config=hf.PixtralVisionConfig(**vision_settings(70)),
            text_config=hf.Qwen3Config(**text_settings(head_dim=8)),
            image_token_id=IMAGE,
            tie_word_embeddings=False,
        )

    def image(self, which: int, generator: torch.Generator, count: int) -> Piece:
        piece = super().image(which, generator, count)
        tokens = [token for token in piece.tokens if token[0] == IMAGE]
        piece.tokens = [*marks(START, kind="text"), *tokens, *marks(END, kind="text")]
        return piece


class QianfanOCR(InternVL):
    name = model_type = "qianfan_ocr"
    model_class = "QianfanOCRForConditionalGeneration"
    has_video = False
    notes = "as internvl, without clips"

    def config(self) -> Any:
        return hf.QianfanOCRConfig(
            vision_config=vision_settings(42, use_mask_token=False)
            | {"image_size": [42, 42], "patch_size": [7, 7]},
            text_config=hf.Qwen3Config(**text_settings(head_dim=8)),
            image_token_id=IMAGE,
            image_seq_length=9,
            tie_word_embeddings=False,
        )


class Glmga(Glm46V):
    name = model_type = "glmga"
    notes = Glm46V.notes + "; a config of its own"

    def config(self) -> Any:
        dense = super().config()
        return hf.GlmgaConfig(
            vision_config=dense.vision_config, text_config=dense.text_config, **self.marks()
        )


class PPChart2Table(GotOcr2):
    name = model_type = "pp_chart2table"

    def config(self) -> Any:
        vision = super().config().vision_config.to_dict()
        del vision["model_type"]
        return hf.PPChart2TableConfig(
            vision_config=vision,
            text_config=hf.Qwen2Config(**text_settings()),
            image_token_index=IMAGE,
            image_seq_length=16,
            tie_word_embeddings=False,
        )


class MiniCPMV(TinyFamily):
    name = model_type = "minicpmv4_6"
    model_class = "MiniCPMV4_6ForConditionalGeneration"
    config_class = "MiniCPMV4_6Config"
    by = 4
    dims: ClassVar = {"pixel_values": 3}
    marked: ClassVar[dict[str, int]] = {}
    notes = (
        "the language model of qwen3_5 with positions that count tokens; 4x4 patches make a token, "
        "2x2 of them inside the tower; image 1 has two slices, the whole first"
    )
    grids: tuple[tuple[tuple[int, int], ...], ...] = (
        ((3, 4),),
        ((2, 3), (2, 3), (2, 3)),
        ((2, 5),),
    )

    def config(self) -> Any:
        text = Qwen35().config().text_config.to_dict()
        text["model_type"] = "qwen3_5_text"
        made: Any = getattr(hf, self.config_class)
        return made(
            vision_config=vision_settings(32, patch_size=4, insert_layer_id=0),
            text_config=text,
            insert_layer_id=0,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            tie_word_embeddings=False,
            **self.marked,
        )

    def mark(self, crop: int, tokens: list[Any]) -> list[Any]:
        """The tokens of a crop between marks."""
        return [*marks(START, kind="text"), *tokens, *marks(END, kind="text")]

    def image(self, which: int, generator: torch.Generator, count: int) -> Piece:
        grids, tokens, values = self.grids[which], [], []
        for i, (rows, columns) in enumerate(grids):
            crop = cells(rows, columns, crop=i if len(grids) > 1 else None)
            tokens += self.mark(i, crop)
            values.append(pixels(generator, 1, 3, 4, 4 * self.by**2 * rows * columns))
        sizes = self.by * torch.tensor(grids)
        extras = {"pixel_values": torch.cat(values, 3), "target_sizes": sizes}
        return Piece(tokens, extras)


class MiniCPMOcr(MiniCPMV):
    name = model_type = "minicpm_ocr"
    model_class = "MiniCPMOcrForConditionalGeneration"
    config_class = "MiniCPMOcrConfig"
    by = 2
    notes = MiniCPMV.notes + "; 2x2 patches make a token, none inside the tower"


class MiniCPMV47(MiniCPMV):
    name = model_type = "minicpmv4_7"
    model_class = "MiniCPMV4_7ForConditionalGeneration"
    config_class = "MiniCPMV4_7Config"
    per_token = ("mm_token_type_ids",)
    notes = MiniCPMV.notes + "; m-RoPE, in which the slices of an image share one canvas"
    marked: ClassVar = {
        "image_start_id": START,
        "image_end_id": END,
        "slice_start_id": TAG,
        "slice_end_id": TAG + 1,
        "newline_id": TAG + 2,
    }

    def mark(self, crop: int, tokens: list[Any]) -> list[Any]:
        if crop == 0:
            return [*marks(START, kind="text"), *tokens, *marks(END, kind="text")]
        return [*marks(TAG, kind="text"), *tokens, *marks(TAG + 1, kind="text")]

    def finish(self, input_ids: Tensor, images: int, extras: dict[str, Tensor]) -> None:
        extras["mm_token_type_ids"] = (input_ids == IMAGE).long()[None]


class MuseGlimmer(Qwen2VL):
    model_type = "muse_glimmer"
    model_class = "MuseGlimmerForConditionalGeneration"
    per_token = ()

    def __init__(self, name: str, window: int) -> None:
        self.name, self.window = name, window
        self.notes = (
            f"positions count tokens; a window of {window} in layers with rotary positions, the "
            "others have full attention and no positions; a timestamp before each frame"
        )

    def config(self) -> Any:
        return hf.MuseGlimmerConfig(
            vision_config={
                "patch_size": self.patch,
                "pos_emb_height": 5,  # of a window too, which so cuts through squares of patches
                "pos_emb_width": 5,
                "num_attention_heads": 4,
                "num_hidden_layers": 2,
                "hidden_size": 32,
                "intermediate_size": 48,
            },
            text_config=text_settings(
                head_dim=8,
                sliding_window=self.window,
                layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
                layer_rope_theta=[1e4, 1e4, 0] * 2,
                # Norms behind each part blow up what is nearly zero, and rounding with it.
                rms_norm_eps=1e-3,
                post_norm_eps=1e-3,
            ),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            out_hidden_size=128,
            projector_hidden_size=32,
            tie_word_embeddings=False,
        )

    def clip(self, frames: int, rows: int, columns: int) -> list[Any]:
        tokens: list[Any] = []
        for f in range(frames):
            tokens += [*marks(TAG + f, kind="text"), *cells(rows, columns, frame=f, token=VIDEO)]
        return tokens

    def finish(self, input_ids: Tensor, images: int, extras: dict[str, Tensor]) -> None:
        return


class MuseSpark(MuseGlimmer):
    model_type = "muse_spark"
    model_class = "MuseSparkForConditionalGeneration"

    def config(self) -> Any:
        dense = super().config()
        vision, text = dense.vision_config.to_dict(), dense.text_config.to_dict()
        del vision["model_type"], text["model_type"], text["hidden_activation"]
        experts = {
            "moe_intermediate_size": 16,
            "moe_hidden_size": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "mlp_layer_types": ["dense"] + ["sparse"] * 5,
            "rms_norm_eps": 1e-2,
            "post_norm_eps": 1e-2,
            "qk_scale_factor": 2.0,  # sharper attention blows up rounding
        }
        return hf.MuseSparkConfig(
            vision_config=vision,
            text_config=text | experts,
            audio_config={
                "patch_sizes": [4, 2],
                "hidden_sizes": [8, 8],
                "depths": [1, 1],
                "num_hidden_layers": 2,
                "out_hidden_size": 32,
            },
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            audio_token_id=TAG + 9,
            out_hidden_size=128,
            projector_hidden_size=32,
            tie_word_embeddings=False,
        )


register(
    MuseSpark("muse_spark", 400),
    MuseGlimmer("muse_glimmer", 400),
    MuseGlimmer("muse_glimmer_short", 12),
    MiniCPMV(),
    MiniCPMOcr(),
    MiniCPMV47(),
    LightOnOcr(),
    QianfanOCR(),
    Glmga(),
    PPChart2Table(),
    Ernie45VL(),
    Qwen35Moe(),
    GlmOcr(),
    Qwen25Omni(),
    Qwen3Omni(),
    Lfm2VL(),
    Aria(),
    Exaone45(),
    HyperClovaX(),
    Lfm3VL(),
    VideoLlama3(),
    PaddleOCRVL(),
)
