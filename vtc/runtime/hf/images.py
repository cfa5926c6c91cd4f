# SPDX-License-Identifier: Apache-2.0
"""Matches vision tokens to their images and to the signals captured from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from vtc.core import Method
from vtc.core.errors import ArgumentError
from vtc.core.images import Modality
from vtc.models import Adapter
from vtc.runtime.forward import Forward
from vtc.runtime.signals import ImageSignals, ImageSpan, TowerSignals

Ends = tuple[torch.Size, Tensor, list[ImageSignals]]
Recent = dict[Modality, list[Ends]]
"""By modality, the shape and the first and last row of the latest features, and their signals."""


class SeenImages:
    """Signals captured from images, looked up by the images' features.

    Under `generate` the encoder runs before the model's forward, and beam search repeats its
    features. The feature tensor is therefore the key.

    Args:
        adapter: bound to the model.
        method: named in error messages.

    Attributes:
        adapter: bound to the model.
        method: named in error messages.
        signals: the captured signals, by feature tensor, for as long as it lives.
    """

    def __init__(self, adapter: Adapter, method: Method) -> None:
        self.adapter, self.method = adapter, method
        self.signals: Any = WeakTensorKeyDictionary()

    def remember(
        self, recent: Recent, modality: Modality, features: Any, signals: list[list[ImageSignals]]
    ) -> None:
        """Store the signals of the images that were just encoded.

        Args:
            recent: of this thread; receives them too.
            modality: "image" or "video".
            features: (images, n, d), or a list of (n, d).
            signals: one list per element of `features`.
        """
        self._note(features, signals)
        # Beam search may repeat features as new tensors; first and last rows identify them.
        recent[modality] = [
            (own.shape, own.detach().flatten(0, -2)[[0, -1]].clone(), of_one)
            for own, of_one in zip(features, signals, strict=True)
            if len(own)
        ]

    def _note(self, features: Any, signals: list[list[ImageSignals]]) -> None:
        # Models return a list, or one tensor for all images.
        if isinstance(features, Tensor):
            self.signals[features] = signals
        else:
            for own, of_one in zip(features, signals, strict=True):
                self.signals[own] = [of_one]

    def spans(
        self, recent: Recent, forward: Forward, valid: Tensor, reads: bool
    ) -> list[ImageSpan]:
        """The images of this forward, by sample and in sequence order. An image that the mask hides
        completely is left out.

        Args:
            recent: of this thread.
            forward: the forward in progress.
            valid: (b, s) bool mask of the sequence.
            reads: the method needs the captured signals.

        Returns:
            One span per image.

        Raises:
            ArgumentError: features without captured signals, where the method or the family's
                layout needs them.
            RuntimeError: features that do not match the number of vision tokens or the order of
                the samples.
        """
        found: list[tuple[int, Tensor, ImageSignals]] = []
        for modality, mask in forward.vision.items():
            if modality in forward.features:
                given, mask = forward.features[modality], mask.expand_as(valid)
                found += self._pieces(modality, mask, given, recent, reads)
        found.sort(key=lambda piece: (piece[0], int(piece[1][0])))
        seen = [0] * len(valid)
        spans = []
        for b, place, signals in found:
            span = ImageSpan.of(b, seen[b], place, signals, valid[b])
            if len(span.index):
                spans.append(span)
                seen[b] += 1
        return spans

    def _pieces(
        self, modality: Modality, mask: Tensor, given: Any, recent: Recent, reads: bool
    ) -> list[tuple[int, Tensor, ImageSignals]]:
        """(sample, places, signals) of each image or clip of one modality."""
        sample, place = mask.nonzero(as_tuple=True)
        known = [
            signals
            for of_one in self._known(given, recent.get(modality, ()), modality, reads)
            for signals in of_one
        ]
        size = sum(len(signals.map) for signals in known)
        if size != len(place):
            raise RuntimeError(
                f"{len(place)} vision tokens in the prompt, but {size} vision features in "
                f"{len(known)} images: vtc cannot tell which image a token belongs to"
            )
        pieces: list[tuple[int, Tensor, list[ImageSignals]]] = []
        start, rows = 0, sample.tolist()
        for signals in known:
            b, own = rows[start], place[start : start + len(signals.map)]
            last = rows[start + len(signals.map) - 1]
            if b != last:
                raise RuntimeError(
                    f"the vision features of {type(self.adapter.model).__name__} do not follow "
                    f"the order of the samples: those of an image lie in samples {b} and {last}; "
                    "transformers may repeat several images of one sample so for beams: use "
                    "num_beams=1"
                )
            start += len(signals.map)
            before = pieces[-1] if pieces else None
            follows = (
                before is not None and before[0] == b and int(before[1][-1]) + 1 == int(own[0])
            )
            if modality in self.adapter.joins and follows and before is not None:
                follows = before[2][-1].map.group == signals.map.group
            else:
                follows = False
            if follows:
                assert before is not None
                pieces[-1] = b, torch.cat([before[1], own]), [*before[2], signals]
            else:
                pieces.append((b, own, [signals]))
        return [(b, own, self._joined(signals, modality)) for b, own, signals in pieces]

    def _joined(self, signals: list[ImageSignals], modality: Modality) -> ImageSignals:
        if len(signals) == 1:
            return signals[0]
        # In a tiled image the thumbnail comes last; frames of a clip are not tiles.
        tiles = [signals[-1], *signals[:-1]] if modality == "image" else []
        tower = {
            layer: TowerSignals(
                attention=torch.cat([own.tower[layer].attention for own in signals]),
                keys=torch.cat([own.tower[layer].keys for own in signals]),
                cls_query=signals[-1].tower[layer].cls_query,
                cls_key=signals[-1].tower[layer].cls_key,
                heads=signals[-1].tower[layer].heads,
                crop_query=stacked([own.tower[layer].cls_query for own in tiles]),
                crop_key=stacked([own.tower[layer].cls_key for own in tiles]),
            )
            for layer in signals[0].tower
        }
        states = [own.encoder for own in signals if own.encoder is not None]
        return ImageSignals(
            kept=_kept(signals),
            passed=tuple(tile for own in signals for tile in own.passed),
            map=self.adapter.join([own.map for own in signals], modality),
            tower=tower,
            encoder=torch.cat(states) if states else None,
            encoder_cls=signals[-1].encoder_cls,
            crop_cls=stacked([own.encoder_cls for own in tiles]),
        )

    def _known(
        self, given: Any, recent: Sequence[Ends], modality: Modality, reads: bool
    ) -> list[list[ImageSignals]]:
        """For each element of `given`, the signals captured when its images were encoded."""
        if isinstance(given, Tensor):
            known = self.signals.get(given) or [None] * len(given)
        else:
            known = [self.signals.get(own, [None])[0] for own in given]
        found, repeated = [], False
        for own, signals in zip(given, known, strict=True):
            if signals is None and len(own):
                ends = own.detach().flatten(0, -2)[[0, -1]]
                for shape, known_ends, candidate in recent:
                    same = shape == own.shape and known_ends.device == ends.device
                    if same and torch.equal(known_ends.to(ends), ends):
                        signals, repeated = candidate, True
                        break
            if signals is None:
                if reads:
                    raise ArgumentError(
                        "mm_encoder_outputs",
                        f"{self.method} reads the vision tower, and these "
                        "features did not come from get_image_features of the patched model",
                    )
                if type(self.adapter).image_maps is not Adapter.image_maps:
                    raise ArgumentError(
                        "mm_encoder_outputs",
                        f"vtc must see how images of "
                        f"{type(self.adapter.model).__name__} are laid out, and these features "
                        f"did not come from get_{modality}_features of the patched model",
                    )
                signals = [ImageSignals(self.adapter.plain_map(len(own), 0))]
            found.append(signals)
        if repeated:  # later steps pass them again, perhaps after other images
            self._note(given, found)
        return found


def stacked(rows: list[Tensor | None]) -> Tensor | None:
    """Stack the rows that are not `None`.

    Args:
        rows: each (d,) or `None`.

    Returns:
        (c, d), or `None` if there is no row.
    """
    found = [row for row in rows if row is not None]
    return torch.stack(found) if found else None


def _kept(signals: list[ImageSignals]) -> Tensor | None:
    """The filled places of joined images, of all their vision tokens; `None` for all."""
    if all(own.kept is None for own in signals):
        return None
    found, first = [], 0
    for own in signals:
        count = len(own.map)
        if own.map.separator is not None:
            count -= int(own.map.separator.sum())
        found.append(first + (torch.arange(count) if own.kept is None else own.kept.cpu()))
        first += count
    return torch.cat(found)
