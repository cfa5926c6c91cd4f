# SPDX-License-Identifier: Apache-2.0
"""Tiny random VLMs, one per family of transformers, with batches and what is true of them.

Prompts are written by hand, id by id, laid out as the family's own processor would: the same
placeholders, tile tags, newlines and extra tensors. Weights are drawn so that attention is peaked
and every layer matters; otherwise a random model hardly notices that tokens were dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from torch.nn import functional

PAD, BOS, IMAGE, VIDEO, START, END, TAG = range(7)
"""Ids with a meaning. `TAG` and up to `FIRST_WORD` name tiles, line breaks and the like."""
FIRST_WORD, VOCABULARY = 24, 128
LAYERS = 6

Cell = tuple[int, int, int, int | None] | Literal["separator", "text"]
"""What one position of an image's span is: (frame, row, column, tile) of a vision token, a
separator, or text that only stands beside the image."""


class Unsupported(Exception):
    """The family has no such batch; the message says why."""


# ---- rows ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ImageTruth:
    """Where one image (or clip) of a row lies.

    Attributes:
        index: places in `input_ids` of its vision tokens.
        separators: places of what belongs to it without being a patch: newline features, tile
            tags, and any text between its first and its last vision token.
        grid: (frame, row, column) of each vision token. Where tiles follow one another, row and
            column count within the tile; where the tiles are fused into one plane (LLaVA-NeXT,
            OneVision), over that plane after un-padding.
        crop: tile of each vision token, 0 for the thumbnail; `None` where nothing is tiled.
        video: whether it is a clip.
    """

    index: tuple[int, ...]
    separators: tuple[int, ...]
    grid: tuple[tuple[int, int, int], ...]
    crop: tuple[int, ...] | None
    video: bool = False


@dataclass(frozen=True, eq=False)
class Row:
    """One sample without padding.

    Attributes:
        input_ids: (s,) whole numbers.
        extras: what else the row contributes, by the name of the model's argument. The first
            dimension counts images, patches or rows, as the model has it.
        images: in order of their placeholders.
    """

    input_ids: Tensor
    extras: dict[str, Tensor]
    images: tuple[ImageTruth, ...]


@dataclass(eq=False)
class Piece:
    """An image or clip as the processor would hand it on: ids, what they are, and tensors."""

    tokens: list[tuple[int, Cell]]
    extras: dict[str, Tensor] = field(default_factory=dict)
    video: bool = False
    aside: list[tuple[int, int, int, int | None]] = field(default_factory=list)
    """Cells of vision tokens that are not in the sequence: cross-attention states."""


def cells(
    rows: int, columns: int, *, frame: int = 0, crop: int | None = None, token: int = IMAGE
) -> list[tuple[int, Cell]]:
    """A grid of vision tokens in raster order."""
    return [(token, (frame, r, c, crop)) for r in range(rows) for c in range(columns)]


def marks(*ids: int, kind: Literal["separator", "text"] = "separator") -> list[tuple[int, Cell]]:
    """Tokens that are not patches."""
    return [(i, kind) for i in ids]


def join(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Concatenate along `dim`, all other dimensions padded with zeros to the largest."""
    shape = [max(t.shape[d] for t in tensors) for d in range(tensors[0].dim())]
    padded = []
    for t in tensors:
        missing = [0 if d == dim else m - t.shape[d] for d, m in enumerate(shape)]
        padded.append(functional.pad(t, [n for m in reversed(missing) for n in (0, m)]))
    return torch.cat(padded, dim=dim)


def pixels(generator: torch.Generator, *shape: int) -> Tensor:
    """Random pixel values."""
    return torch.randn(*shape, generator=generator)


def long(*values: Any) -> Tensor:
    """(1, n) whole numbers."""
    return torch.tensor([values])


# ---- weights ------------------------------------------------------------------------------------
@torch.no_grad()
def draw_weights(model: Any, seed: int, never: Iterable[int]) -> None:
    """Give every parameter a scale at which a random transformer attends to few tokens.

    Args:
        never: ids whose row of the output embedding becomes zero, so that they are not generated.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(parameter: Tensor, std: float, mean: float = 0.0) -> None:
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        parameter.copy_(mean + std * noise)

    for name, parameter in model.named_parameters():
        kind = name.rsplit(".", 1)[-1]
        table = any(word in name for word in ("embed", "query_tokens", "latents", "vte."))
        if kind == "bias":
            normal(parameter, 0.1)
        elif kind in ("A_log", "dt_bias"):  # the decay of linear attention: its own scale
            continue
        elif "gate" in name and parameter.numel() == 1:  # tanh of it, zero before training
            normal(parameter, 0.1, mean=1.0)
        elif any(word in name for word in ("lambda_", "layer_scale", "gamma")):
            normal(parameter, 0.1, mean=0.7)
        elif parameter.dim() == 1 and "class_embedding" not in name and "newline" not in name:
            # The weight of a norm: about 1, or about 0 where the model adds the 1.
            normal(parameter, 0.1, mean=round(parameter.float().mean().item()))
        elif "class_embedding" in name or "newline" in name or (table and "patch" not in name):
            normal(parameter, 1.0)
        else:
            fan_in = parameter.shape[-1] if "experts" in name else parameter[0].numel()
            peaked = any(w in name for w in ("q_proj", "k_proj", "q_norm", "k_norm"))
            normal(parameter, (1.3 if peaked else 1.0) / fan_in**0.5)
    head_of(model).weight[list(never)] = 0.0


def head_of(model: Any) -> Any:
    """The output embedding, of a model or of the language model in it."""
    return model.get_output_embeddings() or model.language_model.get_output_embeddings()


# ---- families -----------------------------------------------------------------------------------
def text_settings(**more: Any) -> dict[str, Any]:
    """Settings that text configs share, and `more`."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": None,
        "tie_word_embeddings": False,
        **more,
    }


def vision_settings(image_size: int, patch_size: int = 7, **more: Any) -> dict[str, Any]:
    """Settings that vision configs share, and `more`."""
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": image_size,
        "patch_size": patch_size,
        **more,
    }


LAYOUTS: dict[str, tuple[tuple[int | str, ...], ...]] = {
    "one": ((2, "image0", 7),),
    "ragged": ((1, "image0", 9), (4, "image1", 3), (2, "image2", 6)),
    "images": ((2, "image1", 3, "image2", 5), (1, "image0", 4), (3, "image2", "image0", 4)),
    "mixed": ((2, "image0", 6), (11,), (1, "image1", 5)),
    "video": ((2, "video0", 7), (4, "video1", 3), (1, "image0", 3, "video0", 4)),
    "text": ((9,), (5,)),
}
"""Rows by kind of batch: numbers of random words, and images and clips by size. The last row of
"images" has two images with nothing between them but the family's own marks."""


class TinyFamily:
    """One family (or a variant of it). Subclasses say what its config and images are.

    Attributes:
        name: key in `FAMILIES`.
        model_type: of the config.
        model_class: name in `transformers`.
        has_video: whether there are batches of kind "video".
        max_images: most images of one row, or `None`.
        layouts: what replaces `LAYOUTS` where the model cannot run those.
        per_token: extras of shape (1, s, ...), padded as `input_ids` are.
        per_row: extras whose first dimension counts rows: zeros stand for a row without.
        dims: the dimension along which an extra of several images is joined, if not the first.
        attentions: what `build` takes.
        unstable: kinds of batch in which transformers itself gives a row other logits than alone.
        never: ids that are never generated.
        words_end: words have ids from `FIRST_WORD` to this, exclusive.
        notes: what a reader of a failing test should know.
    """

    name: str = ""
    model_type: str = ""
    model_class: str = ""
    has_video: bool = False
    max_images: int | None = None
    layouts: ClassVar[Mapping[str, tuple[tuple[int | str, ...], ...]]] = {}
    per_token: tuple[str, ...] = ()
    per_row: tuple[str, ...] = ()
    dims: ClassVar[Mapping[str, int]] = {}
    attentions: tuple[str, ...] = ("eager", "sdpa")
    unstable: tuple[str, ...] = ()
    never: tuple[int, ...] = tuple(range(FIRST_WORD))
    words_end: int = VOCABULARY
    notes: str = ""

    # ---- what families say --------------------------------------------------------------------
    def config(self) -> Any:
        """A new config."""
        raise NotImplementedError

    def image(self, which: int, generator: torch.Generator, count: int) -> Piece:
        """An image.

        Args:
            which: 0, 1 or 2; different sizes where the family has them.
            count: images in its row, on which some processors depend.
        """
        raise NotImplementedError

    def video(self, which: int, generator: torch.Generator) -> Piece:
        """A clip; `which` is 0 or 1."""
        raise Unsupported(f"{self.name} has no video")

    def finish(self, input_ids: Tensor, images: int, extras: dict[str, Tensor]) -> None:
        """Add to `extras` what depends on the whole row."""

    # ---- what tests use -----------------------------------------------------------------------
    def build(
        self, attention: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> nn.Module:
        """A new model in evaluation mode; equal seeds give equal weights for any `attention`.

        Raises `Unsupported` for an `attention` that the family lacks in transformers.
        """
        if attention not in self.attentions:
            raise Unsupported(
                f"{self.name} has attention {' or '.join(self.attentions)}, not {attention}"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            cls = getattr(transformers, self.model_class)
            # Not .to(dtype) afterwards, which makes complex rotary factors of Llama 4 real.
            model = cls._from_config(self.config(), attn_implementation=attention, dtype=dtype)
        draw_weights(model, seed, self.never)
        model.generation_config.pad_token_id = PAD
        model.generation_config.bos_token_id = BOS
        model.generation_config.eos_token_id = None
        return model.eval()

    def rows(self, kind: str) -> tuple[Row, ...]:
        """The rows of the batch `kind` of `LAYOUTS`; raises `Unsupported` if there are none."""
        if kind not in LAYOUTS:
            raise ValueError(f"kind: expected one of {', '.join(LAYOUTS)}, got {kind!r}")
        if kind == "video" and not self.has_video:
            raise Unsupported(f"{self.name} has no video")
        layouts = self.layouts.get(kind, LAYOUTS[kind])
        if not layouts:
            raise Unsupported(f"{self.name} takes no batch of kind {kind!r}: {self.notes}")
        most = max(sum(isinstance(p, str) for p in layout) for layout in layouts)
        if self.max_images is not None and most > self.max_images:
            raise Unsupported(f"{self.name} takes {self.max_images} image(s) a row, not {most}")
        return tuple(self._row(layout, 100 + i) for i, layout in enumerate(layouts))

    def _row(self, layout: Sequence[int | str], seed: int) -> Row:
        generator = torch.Generator().manual_seed(seed)
        count = sum(isinstance(p, str) and p.startswith("image") for p in layout)
        ids, truths = [BOS], []
        extras: dict[str, list[Tensor]] = {}
        for part in layout:
            if isinstance(part, int):
                words = torch.randint(FIRST_WORD, self.words_end, (part,), generator=generator)
                ids += words.tolist()
                continue
            which = int(part[-1])
            if part.startswith("image"):
                piece = self.image(which, generator, count)
            else:
                piece = self.video(which, generator)
            truths.append(_truth(piece, len(ids)))
            ids += [i for i, _ in piece.tokens]
            for name, value in piece.extras.items():
                extras.setdefault(name, []).append(value)
        input_ids = torch.tensor(ids)
        joined = {name: self.join(name, values) for name, values in extras.items()}
        self.finish(input_ids, count, joined)
        return Row(input_ids, joined, tuple(truths))

    def join(self, name: str, values: Sequence[Tensor]) -> Tensor:
        """The extras of one row's images as one tensor."""
        return join(values, self.dims.get(name, 0))

    def collate(self, rows: Sequence[Row], side: str = "left") -> dict[str, Tensor]:
        """A padded batch of the model's arguments, `attention_mask` among them."""
        if side not in ("left", "right"):
            raise ValueError(f"side: expected left or right, got {side!r}")
        width = max(row.input_ids.numel() for row in rows)

        def pad(values: Tensor, fill: int) -> Tensor:  # (1, s, ...)
            filling = values.new_full((1, width - values.shape[1], *values.shape[2:]), fill)
            return torch.cat([filling, values] if side == "left" else [values, filling], dim=1)

        batch = {
            "input_ids": torch.cat([pad(row.input_ids[None], PAD) for row in rows]),
            "attention_mask": torch.cat([pad(torch.ones_like(r.input_ids)[None], 0) for r in rows]),
        }
        for name in dict.fromkeys(name for row in rows for name in row.extras):
            values = [row.extras[name] for row in rows if name in row.extras]
            if name in self.per_row:
                none = values[0].new_zeros(1, *[0] * (values[0].dim() - 1))
                values = [row.extras.get(name, none) for row in rows]
            if name in self.per_token:
                values = [pad(v, 0) for v in values]
            batch[name] = join(values, self.dims.get(name, 0))
        return batch


class OneGrid(TinyFamily):
    """All images have one size and one grid of `side` x `side` tokens, `side_pixels` wide."""

    side, side_pixels = 4, 28
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    def image(self, which: int, generator: torch.Generator, count: int) -> Piece:
        tokens = [*marks(*self.before, kind="text"), *cells(self.side, self.side)]
        tokens += marks(*self.after, kind="text")
        size = self.side_pixels
        return Piece(tokens, {"pixel_values": pixels(generator, 1, 3, size, size)})


class Tiled(TinyFamily):
    """An image is a thumbnail and, but for the smallest, tiles; each has a grid of its own."""

    side, side_pixels = 3, 42
    tiling: Sequence[tuple[int, int]] = ((1, 2), (2, 1), (0, 0))
    """Rows and columns of tiles by size; none means the thumbnail alone."""

    def tile(self, crop: int | None) -> list[Any]:
        return cells(self.side, self.side, crop=crop)

    def extras(self, tiles: int, generator: torch.Generator) -> dict[str, Tensor]:
        size = self.side_pixels
        return {"pixel_values": pixels(generator, tiles, 3, size, size)}


def _truth(piece: Piece, offset: int) -> ImageTruth:
    kinds = [kind for _, kind in piece.tokens]
    vision = [i for i, kind in enumerate(kinds) if not isinstance(kind, str)]
    inside = range(vision[0], vision[-1]) if vision else range(0)
    places = [kind for kind in kinds if not isinstance(kind, str)]
    places += piece.aside
    crops = tuple(crop for *_, crop in places if crop is not None)
    return ImageTruth(
        index=tuple(offset + i for i in vision),
        separators=tuple(
            offset + i
            for i, kind in enumerate(kinds)
            if kind == "separator" or (kind == "text" and i in inside)
        ),
        grid=tuple((frame, row, column) for frame, row, column, _ in places),
        crop=crops or None,
        video=piece.video,
    )


FAMILIES: dict[str, TinyFamily] = {}
"""By name: one per family, and variants such as "gemma3_short" (a window shorter than prompts)."""


SINCE = {
    "smolvlm": "5.21",
    "video_llava": "5.21",
    "llava_next_video": "5.21",
    "qwen2_5_omni_thinker": "5.21",
    "qwen3_omni_moe_thinker": "5.21",
    "exaone4_5": "5.21",
    "gemma4_unified": "5.21",
    "granite_docling": "5.21",
    "hunyuan_vl": "5.21",
}
"""Model types that older transformers do not run as their later ones do, and vtc refuses there."""


def register(*families: TinyFamily) -> None:
    """Add families under their names, but for those that this transformers is too old for."""
    for family in families:
        needed = SINCE.get(family.model_type, "0")
        known = hasattr(transformers, family.model_class)
        if known and Version(transformers.__version__) >= Version(needed):
            FAMILIES[family.name] = family


# The families register themselves; they import the names above.
from tests.reference import (  # noqa: E402, F401
    families_later,
    families_more,
    families_nemotron,
    families_own,
    families_phi4,
    families_recent,
    families_rest,
    families_shapes,
)
