# SPDX-License-Identifier: Apache-2.0
"""Ask a model about one image and record which of its tokens survive, stage by stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vtc.core import Compose, LayerState, Method, Selection, VisionTokens
from vtc.patching import patch
from vtc.viz.pictures import as_rgb
from vtc.viz.views import Places, View, as_pictures, cropped, pixels_of, places_of, views_of

__all__ = ["Trace", "trace", "traced"]


@dataclass(frozen=True)
class Trace:
    """What became of an image's tokens.

    Attributes:
        views: the image with its tokens; of a tiled image the plane of its tiles and its thumbnail.
        answer, answer_full: with the method, and with all tokens.
        note: what the model did not see of the picture, in words, or `None`.
    """

    views: list[View]
    answer: str
    answer_full: str
    note: str | None = None

    @property
    def image(self) -> Image.Image:
        """What the vision tower was shown, in the first view."""
        return self.views[0].image

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the first view's cells."""
        return self.views[0].grid

    @property
    def kept(self) -> dict[str, list[int]]:
        """By stage, the row-major numbers of the tokens left in the first view."""
        return self.views[0].kept

    @property
    def counts(self) -> dict[str, int]:
        """By stage, the tokens left in all views."""
        return {stage: sum(len(v.kept[stage]) for v in self.views) for stage in self.kept}

    @property
    def total(self) -> int:
        """Tokens at first, in all views."""
        return sum(len(view.cells) for view in self.views)


def _grid(tokens: VisionTokens) -> Tensor:
    return tokens.places("trace", "draws tokens where they lie")


@dataclass
class _Record:
    """The vision tokens of one prompt, numbered as they stand, and the survivors by stage."""

    shown: list[VisionTokens] = field(default_factory=list)
    first: list[int] = field(default_factory=list)
    entered: list[list[int]] = field(default_factory=list)
    later: dict[str, list[int]] = field(default_factory=dict)

    def saw(self, tokens: VisionTokens) -> None:
        """All tokens of an image, or of a tile that is one, before any method acts."""
        if tokens.image == 0:
            self.shown, self.first, self.entered, self.later = [], [], [], {}
        self.first.append(sum(map(len, self.shown)))
        self.shown.append(tokens)
        self.entered.append(list(range(self.first[-1], self.first[-1] + len(tokens))))

    def selected(self, image: int, indices: Tensor) -> None:
        """Which of its tokens are left of an image before the language model."""
        self.entered[image] = [self.entered[image][i] for i in indices.tolist()]

    def pruned(self, layer: int, indices: Tensor) -> None:
        """Which of the prompt's tokens are left before a decoder layer."""
        before = list(self.stages.values())[-1]
        self.later[f"before layer {layer}"] = [before[i] for i in indices.tolist()]

    @property
    def stages(self) -> dict[str, list[int]]:
        """By stage, the numbers of the tokens left."""
        return {"into the language model": [n for own in self.entered for n in own], **self.later}

    def among(self, every: _Record) -> dict[str, list[int]]:
        """By stage, the tokens left as `every` numbers them, which saw all; fewer are left of it
        where patches were merged in the tower."""
        if [len(t) for t in self.shown] == [len(t) for t in every.shown]:
            return self.stages
        number: dict[int, int] = {}
        for first, own, whole in zip(every.first, self.shown, every.shown, strict=True):
            at = {tuple(place): first + i for i, place in enumerate(_grid(whole).tolist())}
            for place in _grid(own).tolist():
                number[len(number)] = at[tuple(place)]
        return {stage: [number[n] for n in left] for stage, left in self.stages.items()}

    def places(self, pixels: Tensor | None, patch_size: int | None) -> Places:
        """Where the tokens lie; see `places_of`."""
        crops = [tokens.crop for tokens in self.shown if tokens.crop is not None]
        patches = [tokens.patches for tokens in self.shown if tokens.patches is not None]
        every = len(self.shown)
        return places_of(
            torch.cat([torch.full((len(t),), t.image) for t in self.shown]),
            torch.cat(crops).cpu() if len(crops) == every else None,
            torch.cat([_grid(tokens) for tokens in self.shown]).cpu(),
            torch.cat(patches).cpu() if len(patches) == every else None,
            pixels,
            patch_size,
        )


def _recording(method: Method, record: _Record) -> Method:
    """`method`, telling `record` what it chooses."""
    kind = type(method)

    def select(self: Method, tokens: VisionTokens) -> Selection:
        chosen = kind.select(self, tokens)
        record.selected(tokens.image, chosen.indices)
        return chosen

    def prune(self: Method, state: LayerState) -> Selection | None:
        chosen = kind.prune(self, state)
        if chosen is not None:
            record.pruned(state.layer, chosen.indices)
        return chosen

    methods: dict[str, Any] = {}
    if kind.implements("select"):
        methods["select"] = select
    if kind.implements("prune"):
        methods["prune"] = prune
    # A subclass and not a wrapper, so that it acts where the method acts.
    recorder = type(kind.__name__, (kind,), methods)
    fields = dataclasses.fields(method)  # type: ignore[arg-type]
    made: Method = recorder(**{f.name: getattr(method, f.name) for f in fields if f.init})
    return made


@dataclass(frozen=True)
class _Watch(Method):
    """Keeps all and tells `record` what there is; only merging in the tower stands before it."""

    needs = frozenset({"patches"})

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


def views(
    record: _Record,
    every: _Record,
    inputs: Mapping[str, Any],
    model: Any,
    processor: Any,
    picture: Image.Image,
) -> list[View]:
    """What is drawn of a prompt with one picture.

    Args:
        record: of a run with the method.
        every: of a run in which all tokens were seen.
        inputs: what the model was given.
        processor: of the model.

    Raises:
        ValueError: the tokens have no places in the picture.
    """
    vision = getattr(model.config, "vision_config", None)
    size = getattr(vision, "patch_size", None)
    pixels = pixels_of(inputs)
    places = every.places(pixels, size if isinstance(size, int) else None)
    tiles = None if pixels is None else as_pictures(pixels, processor.image_processor)
    return views_of(places, record.among(every), picture, tiles)


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
        ValueError: a method that acts on pixels, and so drops no tokens, or a model whose tokens
            have no places in the picture.
        PictureError: `picture` cannot be made RGB.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if model is None:
        from vtc.eval.embedded.vlm import embedded_path

        model = str(embedded_path())
    elif Path(model).expanduser().is_dir():
        model = str(Path(model).expanduser())
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    processor = AutoProcessor.from_pretrained(model)
    dtype = torch.float32 if torch.device(device).type == "cpu" else "auto"
    network: Any = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype)
    network.to(device).eval()
    return traced(network, processor, picture, question, method, max_new_tokens)


def traced(
    network: Any,
    processor: Any,
    picture: Image.Image,
    question: str,
    method: Method,
    max_new_tokens: int = 24,
) -> Trace:
    """`trace` of a model that is loaded, with its processor."""
    if "pixels" in method.stages:
        raise ValueError(
            f"method: {method} makes the image smaller; it drops no tokens to be shown"
        )
    picture = as_rgb(picture)
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(images=[picture], text=[prompt], return_tensors="pt")
    inputs = inputs.to(network.device, network.dtype)

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
        shown = views(record, every, inputs, network, processor, picture)
    note = cropped(picture, processor.image_processor) if len(shown) == 1 else None
    return Trace(shown, compressed, full, note)
