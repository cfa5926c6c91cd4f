# SPDX-License-Identifier: Apache-2.0
"""The embedded VLM: a small LLaVA that ships with the project.

`load` reads the trained weights; `build_model` and `build_processor` create the untrained model. It
is an ordinary `LlavaForConditionalGeneration`: a CLIP tower with [CLS] (336 pixels, 14-pixel
patches, 576 vision tokens, features of the penultimate layer), a two-layer projector, and a Llama
decoder of eight layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from .scenes.labels import GRID, IMAGE_SIZE, PATCH_SIZE

SPECIAL_TOKENS: tuple[str, ...] = ("<pad>", "<s>", "</s>", "<image>")
PAD, BOS, EOS, IMAGE = range(len(SPECIAL_TOKENS))
IMAGE_TOKENS = GRID * GRID

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{ 'USER: ' }}
{%- elif message['role'] == 'assistant' -%}{{ 'ASSISTANT: ' }}{%- endif -%}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'assistant' -%}{{ eos_token }}{%- else -%}{{ ' ' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"""
"""`USER: <image>\
question ASSISTANT: answer</s>`; contents are strings or lists of parts."""


def embedded_path() -> Path:
    """The folder with the committed weights, tokenizer and processor."""
    return Path(__file__).resolve().parent / "weights"


def embedded_atp_path() -> Path:
    """The folder with the ATP heads trained for the embedded VLM."""
    return Path(__file__).resolve().parent / "atp"


def load(
    dtype: torch.dtype | str = torch.float32, path: Path | None = None
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The trained model, in evaluation mode, and its processor.

    Args:
        dtype: dtype of the weights.
        path: folder of the model; by default `embedded_path()`.
    """
    folder = embedded_path() if path is None else path
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    return model.eval(), AutoProcessor.from_pretrained(folder)


def build_tokenizer(texts: Iterable[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `texts`: words are whole tokens; digits and capitals are single tokens.

    An initial capital of a lower-case word stays with it. The vocabulary includes all bytes, so any
    text can be encoded.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[0-9]|[A-Z](?![a-z])"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in ("USER:", "ASSISTANT:")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """LLaVA-1.5's processor: shorter edge to 336 pixels, centre crop, CLIP's statistics."""
    tokenizer.chat_template = CHAT_TEMPLATE
    images = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_config(vocab_size: int, width: int = 192) -> LlavaConfig:
    """The configuration: seven tower layers, of which LLaVA reads the sixth, and eight decoder
    layers."""
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=7,
        num_attention_heads=width // 16,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=width,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=8,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=False,
    )


def build_model(vocab_size: int, width: int = 192) -> LlavaForConditionalGeneration:
    """The model with random weights, in fp32."""
    model = LlavaForConditionalGeneration(build_config(vocab_size, width))
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, max_new_tokens=24, do_sample=False
    )
    return model
