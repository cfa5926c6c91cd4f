# SPDX-License-Identifier: Apache-2.0
"""Ask a model about one image and record which of its tokens survive, stage by stage."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from .methods.base import Compose, LayerState, Method, Selection, VisionTokens
from .patching import patch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Trace", "trace"]


@dataclass(frozen=True)
class Trace:
    """What became of an image's tokens.

    Attributes:
        image: what the vision tower was shown (the thumbnail of a tiled image).
        grid: (rows, columns) of its tokens.
        kept: by stage ("into the language model", "before layer 3", ...), the row-major numbers of
            the tokens left.
        answer, answer_full: with the method, and with all tokens.
    """

    image: Image.Image
    grid: tuple[int, int]
    kept: dict[str, list[int]]
    answer: str
    answer_full: str


@dataclass
class _Record:
    """Survivors of one image, as (row, column), while a forward runs."""

    every: list[tuple[int, int]] = field(default_factory=list)
    alive: list[tuple[int, int] | None] = field(default_factory=list)
    stages: dict[str, list[tuple[int, int] | None]] = field(default_factory=dict)

    def saw(self, tokens: VisionTokens) -> None:
        """All tokens before any method acts; those of further tiles are followed as `None`."""
        crops = tokens.crop.tolist() if tokens.crop is not None else [0] * len(tokens)
        places = tokens.grid.tolist()
        self.alive = [
            (int(row), int(column)) if crop == 0 else None
            for crop, (_, row, column) in zip(crops, places, strict=True)
        ]
        self.every = [place for place in self.alive if place is not None]
        self.stages = {"into the language model": self.alive}

    def chose(self, stage: str, indices: Tensor) -> None:
        self.alive = [self.alive[i] for i in indices.tolist()]
        self.stages[stage] = self.alive


def _recording(method: Method, record: _Record) -> Method:
    """`method`, telling `record` what it chooses."""
    kind = type(method)

    def select(self: Method, tokens: VisionTokens) -> Selection:
        chosen = kind.select(self, tokens)
        record.chose("into the language model", chosen.indices)
        return chosen

    def prune(self: Method, state: LayerState) -> Selection | None:
        chosen = kind.prune(self, state)
        if chosen is not None:
            record.chose(f"before layer {state.layer}", chosen.indices)
        return chosen

    methods: dict[str, Any] = {}
    if kind.select is not Method.select:
        methods["select"] = select
    if kind.prune is not Method.prune:
        methods["prune"] = prune
    # A subclass and not a wrapper, so that it acts where the method acts.
    recorder = type(kind.__name__, (kind,), methods)
    fields = dataclasses.fields(method)  # type: ignore[arg-type]
    made: Method = recorder(**{f.name: getattr(method, f.name) for f in fields if f.init})
    return made


@dataclass(frozen=True)
class _Watch(Method):
    """Keeps all and tells `record` what there is; only merging in the tower stands before it."""

    record: _Record

    def select(self, tokens: VisionTokens) -> Selection:
        self.record.saw(tokens)
        return Selection(torch.arange(len(tokens), device=tokens.features.device))

    def __str__(self) -> str:
        """Nothing: it is no part of what the user composed."""
        return ""

    __repr__ = __str__


# Named here and not in the class, where it would register.
_Watch.name = "watch"


def _shown(inputs: Any, processor: Any, picture: Image.Image) -> Image.Image:
    """What the tower sees, from its normalised pixels; `picture` where they are not an image."""
    pixels = inputs["pixel_values"]
    while pixels.dim() > 3:
        pixels = pixels[0]  # the first tile is the thumbnail
    images = processor.image_processor
    if pixels.dim() != 3 or pixels.shape[0] != 3:
        return picture
    mean, std = (torch.tensor(v)[:, None, None] for v in (images.image_mean, images.image_std))
    values = (pixels.float().cpu() * std + mean).clamp(0, 1) * 255
    return Image.fromarray(values.round().byte().permute(1, 2, 0).numpy())


def trace(
    model: str | None,
    picture: Image.Image,
    question: str,
    method: Method,
    device: str | None = None,
    max_new_tokens: int = 24,
) -> Trace:
    """Ask `model` (a folder, an id, or `None` for vtc's own) about `picture`, twice.

    Raises:
        OSError: no such model.
        ValueError: a method that acts on pixels, and so drops no tokens.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if "pixels" in method.stages:
        raise ValueError(
            f"method: {method} makes the image smaller; it drops no tokens to be shown"
        )
    if model is None:
        from vtc.eval.embedded_vlm import embedded_path

        model = str(embedded_path())
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    processor = AutoProcessor.from_pretrained(model)
    dtype = torch.float32 if torch.device(device).type == "cpu" else "auto"
    network: Any = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype)
    network.to(device).eval()
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(images=[picture], text=[prompt], return_tensors="pt")
    inputs = inputs.to(device, network.dtype)

    def answer() -> str:
        out = network.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = out[0, inputs["input_ids"].shape[1] :]
        return str(processor.decode(new, skip_special_tokens=True)).strip()

    with torch.inference_mode():
        every, record = _Record(), _Record()
        # Nothing is dropped, which leaves the model as it is bit for bit.
        with patch(network, Compose((_Watch(every),))):
            full = answer()
        merging = [m for m in method.parts if "encoder" in m.stages]
        rest = [_recording(m, record) for m in method.parts if m not in merging]
        with patch(network, Compose((*merging, _Watch(record), *rest))):
            compressed = answer()
    rows = 1 + max(row for row, _ in every.every)
    columns = 1 + max(column for _, column in every.every)
    return Trace(
        image=_shown(inputs, processor, picture),
        grid=(rows, columns),
        kept={
            stage: [place[0] * columns + place[1] for place in places if place is not None]
            for stage, places in record.stages.items()
        },
        answer=compressed,
        answer_full=full,
    )
