# SPDX-License-Identifier: Apache-2.0
"""The contract of an image tokenizer: images to sequences of whole numbers, and back.

Sequences may differ in length within a batch: a caller asks for a number of codes or for an error
of the reconstruction, image by image. The result of an image never depends on the others of its
batch, seeds included: a batch gives what its images give one by one, up to rounding.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from .errors import ArgumentError, ArgumentTypeError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_SEEDS = 2**63
"""Seeds are below this number: what `torch.randint` can draw, and every generator accepts."""


@dataclass(frozen=True, eq=False)
class Codes:
    """The code sequences of a batch of images, without padding.

    Two of them are equal if vocabulary, lengths and codes are, whatever their devices.

    Args:
        ids: for each image a (k_i,) int64 tensor of whole numbers in [0, `vocabulary`), all on one
            device. A sequence may be empty.
        vocabulary: number of different codes.

    Raises:
        ArgumentTypeError: `ids` is not a tuple of int64 tensors, or `vocabulary` not a whole
            number.
        ArgumentError: no sequence, one that is not 1D, several devices, or a code out of range.
    """

    ids: tuple[Tensor, ...]
    vocabulary: int

    def __post_init__(self) -> None:
        import torch

        _check("vocabulary", self.vocabulary, lowest=1)
        if not isinstance(self.ids, tuple):
            raise ArgumentTypeError(
                "ids", f"expected a tuple of tensors, got {type(self.ids).__name__}"
            )
        if not self.ids:
            raise ArgumentError("ids", "at least one sequence is needed, got none")
        for i, own in enumerate(self.ids):
            kind = own.dtype if isinstance(own, torch.Tensor) else type(own).__name__
            if kind != torch.int64:
                raise ArgumentTypeError("ids", f"expected int64 tensors, got {kind} at {i}")
            if own.dim() != 1:
                raise ArgumentError("ids", f"expected shape (k,), got {tuple(own.shape)} at {i}")
        devices = sorted({str(own.device) for own in self.ids})
        if len(devices) > 1:
            raise ArgumentError("ids", f"expected one device, got {', '.join(devices)}")
        every = torch.cat(self.ids)
        if len(every) and not (0 <= int(every.min()) <= int(every.max()) < self.vocabulary):
            raise ArgumentError(
                "ids",
                f"expected codes from 0 to {self.vocabulary - 1}, "
                f"got {int(every.min())} to {int(every.max())}",
            )

    def __len__(self) -> int:
        return len(self.ids)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Codes):
            return NotImplemented
        same = (self.vocabulary, self.lengths) == (other.vocabulary, other.lengths)
        pairs = zip(self.ids, other.ids, strict=False)
        return same and all(bool((a == b.to(a.device)).all()) for a, b in pairs)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of codes of each image."""
        return tuple(own.shape[0] for own in self.ids)

    def padded(self, fill: int) -> tuple[Tensor, Tensor]:
        """The sequences as one tensor, filled up at their ends.

        Args:
            fill: a whole number for the places without a code; it need not be in the vocabulary.

        Returns:
            ids: (b, k) int64, k being the longest length.
            mask: (b, k) bool, true where there is a code.

        Raises:
            ArgumentTypeError: `fill` is not a whole number.
        """
        import torch

        _check("fill", fill)
        lengths = torch.tensor(self.lengths, device=self.ids[0].device)
        mask = torch.arange(max(self.lengths), device=lengths.device) < lengths[:, None]
        ids = torch.full(mask.shape, fill, dtype=torch.int64, device=lengths.device)
        ids[mask] = torch.cat(self.ids)
        return ids, mask

    @classmethod
    def from_padded(cls, ids: Tensor, mask: Tensor, vocabulary: int) -> Codes:
        """The inverse of `padded`; padding may be anywhere, and holds any numbers.

        Args:
            ids: (b, k) int64.
            mask: (b, k) bool, true where there is a code.
            vocabulary: number of different codes.

        Raises:
            ArgumentTypeError: `mask` is not a bool tensor, or as in `Codes`.
            ArgumentError: shapes are not (b, k) or differ, or as in `Codes`.
        """
        import torch

        if not isinstance(ids, torch.Tensor):
            raise ArgumentTypeError("ids", f"expected a tensor, got {type(ids).__name__}")
        if ids.dim() != 2:
            raise ArgumentError("ids", f"expected shape (b, k), got {tuple(ids.shape)}")
        kind = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
        if kind != torch.bool:
            raise ArgumentTypeError("mask", f"expected a bool tensor, got {kind}")
        if mask.shape != ids.shape:
            raise ArgumentError(
                "mask", f"expected the shape {tuple(ids.shape)} of ids, got {tuple(mask.shape)}"
            )
        return cls(tuple(own[real] for own, real in zip(ids, mask, strict=True)), vocabulary)

    def prefix(self, k: int | Sequence[int]) -> Codes:
        """The first `k` codes of each image, of shorter sequences all. Only tokenizers whose codes
        are ordered by importance can decode them.

        Args:
            k: a whole number of at least 1, or one for each image.

        Raises:
            ArgumentTypeError: not whole numbers.
            ArgumentError: numbers below 1, or not one for each image.
        """
        counts = _each("k", k, len(self), 1)
        kept = tuple(own[:count] for own, count in zip(self.ids, counts, strict=True))
        return Codes(kept, self.vocabulary)

    def to(self, device: torch.device | str) -> Codes:
        """The same codes on another device."""
        return Codes(tuple(own.to(device) for own in self.ids), self.vocabulary)


class Tokenizer(ABC):
    """Base of image tokenizers. It has no state, so that `class Own(Tokenizer, nn.Module)` works.

    A subclass implements `_encode` and `_decode` and declares what they read; all else is refused.
    Codes carry no gradient: training calls the subclass's modules, not these functions.

    Attributes:
        budgets: "tokens" if a caller sets the number of codes, "error" if the error of the
            reconstruction; with both, one of them in each call. Empty if the number is fixed.
        reads_text: whether a text may accompany each image, in `encode` and in `decode`.
        draws: "encode" and "decode", if they draw random numbers, and so read a seed.
        vocabulary: number of different codes.
        max_tokens: most codes of an image.
    """

    budgets: ClassVar[frozenset[str]] = frozenset()
    reads_text: ClassVar[bool] = False
    draws: ClassVar[frozenset[str]] = frozenset()
    vocabulary: int
    max_tokens: int

    def encode(
        self,
        images: Tensor,
        *,
        tokens: int | Sequence[int] | None = None,
        error: float | Sequence[float] | None = None,
        text: str | Sequence[str] | None = None,
        seed: int | Sequence[int] | None = None,
    ) -> Codes:
        """The codes of images. Where one value is given for all images, each is treated as if it
        alone had been given; a sequence has one value for each image.

        Args:
            images: (b, 3, h, w) floating point, RGB in [0, 1].
            tokens: codes of each image, from 1 to `max_tokens`.
            error: highest error of each reconstruction, at least 0, in the measure that the
                tokenizer's docstring names. The image gets as few codes as the tokenizer finds to
                suffice, and `max_tokens` if none do. Exactly one of `tokens` and `error` is
                given, if the tokenizer has `budgets`.
            text: a text for each image; none is an image without text.
            seed: from 0 to 2**63 - 1. Images with the same seed draw the same numbers; without
                seeds, PyTorch's global generator gives each image its own.

        Returns:
            The codes, in the order of the images.

        Raises:
            ArgumentTypeError: an argument of the wrong type, or one that the tokenizer does not
                accept.
            ArgumentError: a value out of range, not one value for each image, or neither of
                `tokens` and `error` where one is needed, or both.
            RuntimeError: the tokenizer returns what this contract excludes.
        """
        _check_images(images)
        b = len(images)
        self._check_accepted("tokens", tokens, "tokens" in self.budgets)
        self._check_accepted("error", error, "error" in self.budgets)
        if tokens is not None and error is not None:
            raise ArgumentError("error", "give either tokens or error, not both")
        if self.budgets and tokens is None and error is None:
            needed = sorted(self.budgets, reverse=True)  # tokens first
            raise ArgumentError(needed[0], f"{type(self).__name__} needs {' or '.join(needed)}")
        counts = None if tokens is None else _each("tokens", tokens, b, 1, self.max_tokens)
        codes = self._encode(
            images,
            tokens=counts,
            error=None if error is None else _each("error", error, b, 0, kinds=(int, float)),
            text=self._texts(text, b),
            seed=self._seeds(seed, b, "encode" in self.draws),
        )
        wrong = (
            len(codes) != b
            or codes.vocabulary != self.vocabulary
            or max(codes.lengths) > self.max_tokens
            or (counts is not None and codes.lengths != counts)
        )
        if wrong:
            raise RuntimeError(
                f"{type(self).__name__}._encode: returned {codes.lengths} codes out of "
                f"{codes.vocabulary} for {b} images, tokens={counts}, "
                f"max_tokens={self.max_tokens}, vocabulary={self.vocabulary}"
            )
        return codes

    def decode(
        self,
        codes: Codes,
        *,
        text: str | Sequence[str] | None = None,
        seed: int | Sequence[int] | None = None,
    ) -> Tensor:
        """Images of codes, at the tokenizer's own resolution.

        Args:
            codes: of this tokenizer, or in its vocabulary.
            text: as in `encode`, which was given the same; codes do not hold it.
            seed: as in `encode`.

        Returns:
            (b, 3, h, w) floating point, RGB in [0, 1].

        Raises:
            ArgumentTypeError: as in `encode`.
            ArgumentError: as in `encode`; `codes` has another vocabulary, or too long a sequence.
            RuntimeError: the tokenizer returns what this contract excludes.
        """
        if not isinstance(codes, Codes):
            raise ArgumentTypeError("codes", f"expected Codes, got {type(codes).__name__}")
        if codes.vocabulary != self.vocabulary:
            raise ArgumentError(
                "codes", f"expected a vocabulary of {self.vocabulary}, got {codes.vocabulary}"
            )
        if max(codes.lengths) > self.max_tokens:
            raise ArgumentError(
                "codes", f"expected at most {self.max_tokens} an image, got {max(codes.lengths)}"
            )
        b = len(codes)
        images = self._decode(
            codes, text=self._texts(text, b), seed=self._seeds(seed, b, "decode" in self.draws)
        )
        if images.dim() != 4 or images.shape[:2] != (b, 3):
            raise RuntimeError(
                f"{type(self).__name__}._decode: returned shape {tuple(images.shape)} "
                f"for {b} images"
            )
        return images

    # ---- what a subclass implements -----------------------------------------------------------
    @abstractmethod
    def _encode(
        self,
        images: Tensor,
        *,
        tokens: tuple[int, ...] | None,
        error: tuple[float, ...] | None,
        text: tuple[str, ...] | None,
        seed: tuple[int, ...] | None,
    ) -> Codes:
        """`encode` with checked arguments, one value for each image. What the class does not
        declare is `None`; `seed` is not if it `draws`. `tokens` are met exactly."""

    @abstractmethod
    def _decode(
        self, codes: Codes, *, text: tuple[str, ...] | None, seed: tuple[int, ...] | None
    ) -> Tensor:
        """`decode` with checked arguments, likewise. Images are in [0, 1]."""

    # ---- checks -------------------------------------------------------------------------------
    def _check_accepted(self, name: str, value: Any, accepted: bool) -> None:
        if value is not None and not accepted:
            raise ArgumentTypeError(name, f"{type(self).__name__} does not read it here")

    def _texts(self, text: str | Sequence[str] | None, b: int) -> tuple[str, ...] | None:
        self._check_accepted("text", text, self.reads_text)
        return None if text is None else _each("text", text, b, kinds=(str,))

    def _seeds(
        self, seed: int | Sequence[int] | None, b: int, drawn: bool
    ) -> tuple[int, ...] | None:
        import torch

        self._check_accepted("seed", seed, drawn)
        if drawn and seed is None:
            return tuple(torch.randint(_SEEDS - 1, (b,)).tolist())
        return None if seed is None else _each("seed", seed, b, 0, _SEEDS - 1)


def _check_images(images: Any) -> None:
    import torch

    if not isinstance(images, torch.Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, torch.Tensor) else type(images).__name__
        raise ArgumentTypeError("images", f"expected a floating-point tensor, got {kind}")
    if images.dim() != 4 or images.shape[1] != 3 or not images.numel():
        raise ArgumentError(
            "images", f"expected shape (b, 3, h, w), none of them 0, got {tuple(images.shape)}"
        )
    low, high = images.min().item(), images.max().item()
    if not (low >= 0 and high <= 1):  # so worded, it refuses NaN too
        raise ArgumentError("images", f"expected values in [0, 1], got {low} to {high}")


def _each(
    argument: str,
    given: Any,
    count: int,
    lowest: float = -math.inf,
    highest: float = math.inf,
    kinds: tuple[type, ...] = (int,),
) -> tuple[Any, ...]:
    """(count,) checked values: one given for all, or one given for each image."""
    listed = isinstance(given, Sequence) and not isinstance(given, str)
    values = tuple(given) if listed else (given,) * count
    if len(values) != count:
        raise ArgumentError(argument, f"expected one for each of {count} images, got {len(values)}")
    for value in values:
        _check(argument, value, lowest, highest, kinds)
    return values


def _check(
    argument: str,
    value: Any,
    lowest: float = -math.inf,
    highest: float = math.inf,
    kinds: tuple[type, ...] = (int,),
) -> None:
    if isinstance(value, bool) or not isinstance(value, kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ArgumentTypeError(argument, f"expected {names}, got {value!r}")
    # So worded, it refuses NaN too.
    if isinstance(value, (int, float)) and not lowest <= value <= highest:
        within = f"at least {lowest}" if highest == math.inf else f"{lowest} to {highest}"
        raise ArgumentError(argument, f"expected {within}, got {value}")
