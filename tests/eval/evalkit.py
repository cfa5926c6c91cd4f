# SPDX-License-Identifier: Apache-2.0
"""A tiny random LLaVA as a folder, with a processor, and a task of a few rows for it.

The model has 36 vision tokens and words of its own, so that its answers differ from picture to
picture and from method to method, and a test can tell what was done to the tokens.
"""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from tests.reference.models import GRIDS, PATCH, VOCABULARY, build_model

SIDE = GRIDS["clip"] * PATCH
TOKENS = GRIDS["clip"] ** 2
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}answer {% endif %}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<image> {% else %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}answer {% endif %}"
)
QUESTION = "what colour"


def _tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "<image>", "</s>", "answer", "what", "colour"]
    words += [f"w{i}" for i in range(VOCABULARY - len(words) - 1)] + ["<unk>"]
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", additional_special_tokens=["<image>"], chat_template=TEMPLATE,
    )  # fmt: skip


def save_model(folder: Path, seed: int = 0) -> Path:
    """Write the model and its processor as `from_pretrained` wants them."""
    build_model(seed=seed).save_pretrained(folder)
    images = CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    LlavaProcessor(
        image_processor=images, tokenizer=_tokenizer(), patch_size=PATCH,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@cache
def picture(number: int) -> Image.Image:
    """A seeded picture of large blocks."""
    rng = np.random.default_rng(number)
    blocks = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return blocks.resize((SIDE, SIDE), Image.Resampling.NEAREST)


def write_rows(path: Path, answers: list[str]) -> Path:
    """A parquet file of one row for each answer, like those of the suite."""
    rows = []
    for number, answer in enumerate(answers):
        buffer = io.BytesIO()
        picture(number).save(buffer, "PNG")
        rows.append(
            {
                "id": f"row-{number}",
                "image": {"bytes": buffer.getvalue(), "path": None},
                "question": QUESTION,
                "answer": answer,
                "type": "even" if number % 2 == 0 else "odd",
            }
        )
    text = datasets.Value("string")
    features = datasets.Features(
        {"id": text, "image": datasets.Image(), "question": text, "answer": text, "type": text}
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(path))
    return path
