# SPDX-License-Identifier: Apache-2.0
"""The contract of image tokenizers, on a small one that averages patches, coarse to fine."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vtc.core import ArgumentError, ArgumentTypeError, Codes, Tokenizer

SIDES = (1, 2, 4)
ENDS = (1, 5, 21)
"""Codes up to the end of each side's patches."""


class Patches(Tokenizer, nn.Module):
    """Means of 1, 2 x 2 and 4 x 4 patches, 8 levels a channel; finer patches paint over coarser.

    The error is the mean squared one over pixels and channels.
    """

    budgets = frozenset({"tokens", "error"})
    vocabulary = 8**3
    max_tokens = ENDS[-1]

    def __init__(self, size: int = 16) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("levels", (torch.arange(8) + 0.5) / 8)

    def _encode(self, images: Tensor, *, tokens, error, text, seed) -> Codes:
        means = torch.cat(
            [nn.functional.adaptive_avg_pool2d(images, side).flatten(2) for side in SIDES], dim=2
        )
        digits = (means * 8).long().clamp(max=7)
        ids = digits[:, 0] * 64 + digits[:, 1] * 8 + digits[:, 2]
        whole = Codes(tuple(ids), self.vocabulary)
        if error is not None:
            tokens = tuple(
                self._shortest(own, image, most)
                for own, image, most in zip(ids, images, error, strict=True)
            )
        return whole.prefix(tokens)

    def _shortest(self, ids: Tensor, image: Tensor, most: float) -> int:
        whole = Codes((ids,), self.vocabulary)
        for k in range(1, self.max_tokens):
            if (self.decode(whole.prefix(k))[0] - image).square().mean() <= most:
                return k
        return self.max_tokens

    def _decode(self, codes: Codes, *, text, seed) -> Tensor:
        return torch.stack([self._painted(ids) for ids in codes.ids])

    def _painted(self, ids: Tensor) -> Tensor:
        colours = self.levels[torch.stack([ids // 64, ids // 8 % 8, ids % 8])]
        image = self.levels.new_zeros(3, self.size, self.size)
        first = 0
        for side in SIDES:
            edge = self.size // side
            for place in range(min(side * side, len(ids) - first)):
                top, left = place // side * edge, place % side * edge
                patch = colours[:, first + place, None, None]
                image[:, top : top + edge, left : left + edge] = patch
            first += side * side
        return image


class Noise(Tokenizer):
    """Draws both ways. Two codes, of which the second is the length of the text."""

    reads_text = True
    draws = frozenset({"encode", "decode"})
    vocabulary = 1000
    max_tokens = 2

    def _encode(self, images: Tensor, *, tokens, error, text, seed) -> Codes:
        assert tokens is None
        assert error is None
        lengths = [0] * len(images) if text is None else map(len, text)
        drawn = [int(torch.randint(1000, (), generator=_generator(s))) for s in seed]
        ids = [torch.tensor(pair) for pair in zip(drawn, lengths, strict=True)]
        return Codes(tuple(ids), self.vocabulary)

    def _decode(self, codes: Codes, *, text, seed) -> Tensor:
        return torch.stack([torch.rand(3, 4, 4, generator=_generator(s)) for s in seed])


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(b: int, size: int = 16) -> Tensor:
    """(b, 3, size, size) with contents at every scale."""
    generator = _generator(0)
    sizes = [torch.rand(b, 3, n, n, generator=generator) for n in (2, 4, size)]
    return sum(nn.functional.interpolate(part, size=(size, size)) for part in sizes) / 3


ragged = st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=5)


def codes_of(rows: list[list[int]], vocabulary: int = 10) -> Codes:
    return Codes(tuple(torch.tensor(row, dtype=torch.int64) for row in rows), vocabulary)


# ---- codes --------------------------------------------------------------------------------------
@given(rows=ragged, fill=st.integers(-5, 20))
def test_padding_is_undone(rows: list[list[int]], fill: int) -> None:
    codes = codes_of(rows)
    ids, mask = codes.padded(fill)
    assert len(codes) == len(rows)
    assert codes.lengths == tuple(map(len, rows)) == tuple(mask.sum(1).tolist())
    assert ids.dtype == torch.int64
    assert ids.shape == mask.shape == (len(rows), max(map(len, rows)))
    assert [own[: len(row)].tolist() for own, row in zip(ids, rows, strict=True)] == rows
    assert (ids[~mask] == fill).all()
    assert Codes.from_padded(ids, mask, 10) == codes
    assert Codes.from_padded(ids.flip(1), mask.flip(1), 10) == codes_of([r[::-1] for r in rows])


@given(rows=ragged, k=st.integers(1, 8))
def test_a_prefix_is_the_first_codes(rows: list[list[int]], k: int) -> None:
    codes = codes_of(rows)
    assert codes.prefix(k) == codes_of([row[:k] for row in rows])
    assert codes.prefix(k).prefix(k + 1) == codes.prefix(k)
    each = [1 + i % 3 for i in range(len(rows))]
    assert codes.prefix(each) == codes_of([r[:n] for r, n in zip(rows, each, strict=True)])


def test_codes_are_equal_if_their_contents_are() -> None:
    codes = codes_of([[1, 2], [3]])
    assert codes == codes_of([[1, 2], [3]]) == codes.to("cpu")
    others: list[Any] = [codes_of([[1, 2], [4]]), codes_of([[1, 2], [3, 3]]), codes_of([[1, 2]])]
    for other in [*others, codes_of([[1, 2], [3]], 11), ((1, 2), (3,))]:
        assert codes != other


def int64(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


SQUARE = torch.zeros(2, 2, dtype=torch.int64)
REAL = torch.ones(2, 2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("refused", "argument", "kind"),
    [
        (lambda: Codes([int64(1)], 10), "ids", ArgumentTypeError),
        (lambda: Codes(int64(1), 10), "ids", ArgumentTypeError),
        (lambda: Codes(([1, 2],), 10), "ids", ArgumentTypeError),
        (lambda: Codes((int64(1), torch.tensor([1.0])), 10), "ids", ArgumentTypeError),
        (lambda: Codes((int64(1).int(),), 10), "ids", ArgumentTypeError),
        (lambda: Codes((), 10), "ids", ArgumentError),
        (lambda: Codes((int64(1), SQUARE), 10), "ids", ArgumentError),
        (lambda: Codes((int64(1), int64(1).to("meta")), 10), "ids", ArgumentError),
        (lambda: Codes((int64(), int64(3, 10)), 10), "ids", ArgumentError),
        (lambda: Codes((int64(3, -1),), 10), "ids", ArgumentError),
        (lambda: Codes((int64(),), 0), "vocabulary", ArgumentError),
        (lambda: Codes((int64(),), 10.0), "vocabulary", ArgumentTypeError),
        (lambda: Codes((int64(),), True), "vocabulary", ArgumentTypeError),
        (lambda: codes_of([[1]]).padded(0.5), "fill", ArgumentTypeError),
        (lambda: codes_of([[1]]).prefix(0), "k", ArgumentError),
        (lambda: codes_of([[1]]).prefix(1.0), "k", ArgumentTypeError),
        (lambda: codes_of([[1]]).prefix([1, 1]), "k", ArgumentError),
        (lambda: Codes.from_padded([[1]], REAL, 10), "ids", ArgumentTypeError),
        (lambda: Codes.from_padded(int64(1), REAL, 10), "ids", ArgumentError),
        (lambda: Codes.from_padded(SQUARE.float(), REAL, 10), "ids", ArgumentTypeError),
        (lambda: Codes.from_padded(SQUARE, SQUARE, 10), "mask", ArgumentTypeError),
        (lambda: Codes.from_padded(SQUARE, None, 10), "mask", ArgumentTypeError),
        (lambda: Codes.from_padded(SQUARE, REAL[:1], 10), "mask", ArgumentError),
        (lambda: Codes.from_padded(SQUARE, REAL, 0), "vocabulary", ArgumentError),
    ],
)  # fmt: skip
def test_codes_refuse_what_they_cannot_hold(refused, argument: str, kind: type) -> None:
    with pytest.raises(kind) as caught:
        refused()
    assert caught.value.argument == argument


# ---- a tokenizer --------------------------------------------------------------------------------
@settings(deadline=None, max_examples=25)
@given(levels=st.lists(st.integers(0, 7), min_size=48, max_size=48))
def test_what_the_codes_can_say_comes_back(levels: list[int]) -> None:
    tokenizer = Patches()
    small = tokenizer.levels[torch.tensor(levels)].view(1, 3, 4, 4)
    images = nn.functional.interpolate(small, size=(16, 16))
    assert torch.equal(tokenizer.decode(tokenizer.encode(images, tokens=21)), images)
    assert torch.equal(tokenizer.decode(tokenizer.encode(images, error=0)), images)


def test_a_prefix_decodes_to_a_coarser_image() -> None:
    tokenizer, images = Patches(), pictures(3)
    whole = tokenizer.encode(images, tokens=21)
    errors = []
    for side, end in zip(SIDES, ENDS, strict=True):
        assert tokenizer.encode(images, tokens=end) == whole.prefix(end)
        decoded = tokenizer.decode(whole.prefix(end))
        means = nn.functional.adaptive_avg_pool2d(decoded, side)
        assert torch.allclose(nn.functional.interpolate(means, size=(16, 16)), decoded)
        errors.append((decoded - images).square().mean((1, 2, 3)))
    assert (errors[0] > errors[1]).all()
    assert (errors[1] > errors[2]).all()


@pytest.mark.parametrize("error", [0.0, 0.012, 0.016, 0.02, 0.026, math.inf])
def test_an_error_gives_the_shortest_prefix_that_meets_it(error: float) -> None:
    tokenizer, images = Patches(), pictures(4)
    whole = tokenizer.encode(images, tokens=21)
    found = tokenizer.encode(images, error=error)
    assert found == whole.prefix(found.lengths)
    for i, length in enumerate(found.lengths):
        errors = [
            float((tokenizer.decode(whole.prefix(k))[i] - images[i]).square().mean())
            for k in range(1, 22)
        ]
        assert length == next((k for k, e in enumerate(errors, 1) if e <= error), 21)


@pytest.mark.parametrize(
    "budget", [{"tokens": [21, 1, 7, 4]}, {"error": [0.0, 0.016, 0.022, 1.0]}, {"error": 0.016}]
)
def test_a_ragged_batch_is_its_images_one_by_one(budget: dict[str, Any]) -> None:
    tokenizer, images = Patches(), pictures(4)
    together = tokenizer.encode(images, **budget)
    assert len(set(together.lengths)) > 1
    (name, given), decoded = *budget.items(), tokenizer.decode(together)
    for i in range(4):
        own = given[i] if isinstance(given, list) else given
        alone = tokenizer.encode(images[i : i + 1], **{name: own})
        assert torch.equal(alone.ids[0], together.ids[i])
        assert torch.equal(tokenizer.decode(alone)[0], decoded[i])


def test_a_tokenizer_is_a_module() -> None:
    tokenizer = nn.ModuleDict({"own": Patches()}).double()
    assert list(tokenizer.state_dict()) == ["own.levels"]
    images = pictures(2).double()
    own: Any = tokenizer["own"]
    assert own.decode(own.encode(images, tokens=3)).dtype == torch.float64


def test_a_tokenizer_without_its_hooks_is_not_one() -> None:
    class Half(Tokenizer):
        def _decode(self, codes: Codes, *, text, seed) -> Tensor: ...

    with pytest.raises(TypeError, match="_encode"):
        Half()


# ---- seeds and texts ----------------------------------------------------------------------------
def test_a_seed_draws_the_same_whatever_the_batch() -> None:
    tokenizer, images = Noise(), pictures(3)
    codes = tokenizer.encode(images, seed=[5, 6, 5])
    assert torch.equal(codes.ids[0], codes.ids[2])
    assert not torch.equal(codes.ids[0], codes.ids[1])
    assert torch.equal(tokenizer.encode(images[:1], seed=6).ids[0], codes.ids[1])
    assert tokenizer.encode(images, seed=5) == tokenizer.encode(images, seed=[5, 5, 5])
    decoded = tokenizer.decode(codes, seed=[0, 2**63 - 1, 0])
    assert torch.equal(decoded[0], decoded[2])
    assert not torch.equal(decoded[0], decoded[1])
    assert torch.equal(tokenizer.decode(codes.prefix(1), seed=0)[2], decoded[0])


def test_without_seeds_each_image_has_its_own_of_the_global_generator() -> None:
    tokenizer, images = Noise(), pictures(3)
    torch.manual_seed(0)
    first, again = tokenizer.encode(images), tokenizer.encode(images)
    assert len({int(own[0]) for own in first.ids}) == 3
    assert first != again
    torch.manual_seed(0)
    assert tokenizer.encode(images) == first


def test_texts_are_given_to_their_images() -> None:
    tokenizer, images = Noise(), pictures(2)
    for text, lengths in [("red", (3, 3)), (["a", "blue"], (1, 4)), ("", (0, 0)), (None, (0, 0))]:
        codes = tokenizer.encode(images, text=text, seed=0)
        assert tuple(int(own[1]) for own in codes.ids) == lengths
        assert tokenizer.decode(codes, text=text).shape == (2, 3, 4, 4)


# ---- refusals -----------------------------------------------------------------------------------
class Fixed(Patches):
    budgets = frozenset()


class Counted(Patches):
    budgets = frozenset({"tokens"})


class Judged(Patches):
    budgets = frozenset({"error"})


GOOD = torch.full((2, 3, 16, 16), 0.5)
BAD_IMAGES = [
    (None, ArgumentTypeError),
    (GOOD.tolist(), ArgumentTypeError),
    ((GOOD * 255).byte(), ArgumentTypeError),
    (GOOD[0], ArgumentError),
    (GOOD[:, :1], ArgumentError),
    (GOOD.permute(0, 2, 3, 1), ArgumentError),
    (GOOD[:0], ArgumentError),
    (GOOD[..., :0], ArgumentError),
    (GOOD * 2.1, ArgumentError),
    (GOOD - 0.6, ArgumentError),
    (GOOD.where(torch.rand(2, 3, 16, 16) > 0.1, math.nan), ArgumentError),
]


@pytest.mark.parametrize(("images", "kind"), BAD_IMAGES)
def test_images_are_checked(images: Any, kind: type) -> None:
    with pytest.raises(kind) as caught:
        Patches().encode(images, tokens=1)
    assert caught.value.argument == "images"


@pytest.mark.parametrize(
    ("cls", "given", "argument", "kind"),
    [
        (Patches, {}, "tokens", ArgumentError),
        (Counted, {}, "tokens", ArgumentError),
        (Judged, {}, "error", ArgumentError),
        (Patches, {"tokens": 3, "error": 0.1}, "error", ArgumentError),
        (Counted, {"tokens": 3, "error": 0.1}, "error", ArgumentTypeError),
        (Counted, {"error": 0.1}, "error", ArgumentTypeError),
        (Judged, {"tokens": 3}, "tokens", ArgumentTypeError),
        (Fixed, {"tokens": 21}, "tokens", ArgumentTypeError),
        (Fixed, {"error": 0.1}, "error", ArgumentTypeError),
        (Patches, {"tokens": 0}, "tokens", ArgumentError),
        (Patches, {"tokens": 22}, "tokens", ArgumentError),
        (Patches, {"tokens": [3, 22]}, "tokens", ArgumentError),
        (Patches, {"tokens": [3]}, "tokens", ArgumentError),
        (Patches, {"tokens": []}, "tokens", ArgumentError),
        (Patches, {"tokens": 3.0}, "tokens", ArgumentTypeError),
        (Patches, {"tokens": True}, "tokens", ArgumentTypeError),
        (Patches, {"tokens": "33"}, "tokens", ArgumentTypeError),
        (Patches, {"tokens": torch.tensor([3, 3])}, "tokens", ArgumentTypeError),
        (Patches, {"error": -0.1}, "error", ArgumentError),
        (Patches, {"error": math.nan}, "error", ArgumentError),
        (Patches, {"error": [0.1, 0.1, 0.1]}, "error", ArgumentError),
        (Patches, {"error": "0.1"}, "error", ArgumentTypeError),
        (Patches, {"tokens": 3, "text": "a star"}, "text", ArgumentTypeError),
        (Patches, {"tokens": 3, "text": ""}, "text", ArgumentTypeError),
        (Patches, {"tokens": 3, "seed": 0}, "seed", ArgumentTypeError),
        (Noise, {"tokens": 2}, "tokens", ArgumentTypeError),
        (Noise, {"text": 3}, "text", ArgumentTypeError),
        (Noise, {"text": ["a", None]}, "text", ArgumentTypeError),
        (Noise, {"text": ["a"]}, "text", ArgumentError),
        (Noise, {"seed": -1}, "seed", ArgumentError),
        (Noise, {"seed": 2**63}, "seed", ArgumentError),
        (Noise, {"seed": 0.5}, "seed", ArgumentTypeError),
        (Noise, {"seed": [1, 2, 3]}, "seed", ArgumentError),
    ],
)  # fmt: skip
def test_encode_refuses_what_the_tokenizer_does_not_declare(
    cls: type[Tokenizer], given: dict[str, Any], argument: str, kind: type
) -> None:
    with pytest.raises(kind) as caught:
        cls().encode(GOOD, **given)
    assert caught.value.argument == argument


@pytest.mark.parametrize(
    ("cls", "codes", "given", "argument", "kind"),
    [
        (Patches, (int64(1),), {}, "codes", ArgumentTypeError),
        (Patches, codes_of([[1]]), {}, "codes", ArgumentError),
        (Patches, codes_of([[1], [1] * 22], 512), {}, "codes", ArgumentError),
        (Patches, codes_of([[1]], 512), {"text": "a star"}, "text", ArgumentTypeError),
        (Patches, codes_of([[1]], 512), {"seed": 0}, "seed", ArgumentTypeError),
        (Noise, codes_of([[1]], 1000), {"text": ["a", "b"]}, "text", ArgumentError),
        (Noise, codes_of([[1]], 1000), {"seed": [1, 2]}, "seed", ArgumentError),
    ],
)  # fmt: skip
def test_decode_refuses_what_the_tokenizer_does_not_declare(
    cls: type[Tokenizer], codes: Any, given: dict[str, Any], argument: str, kind: type
) -> None:
    with pytest.raises(kind) as caught:
        cls().decode(codes, **given)
    assert caught.value.argument == argument


@pytest.mark.parametrize(
    ("returned", "budget"),
    [
        (codes_of([[1, 2]], 512), {"tokens": 2}),
        (codes_of([[1, 2], [1, 2]], 511), {"tokens": 2}),
        (codes_of([[1, 2], [1]], 512), {"tokens": 2}),
        (codes_of([[1], [1] * 22], 512), {"error": 0.1}),
    ],
)
def test_codes_against_the_contract_do_not_reach_the_caller(
    returned: Codes, budget: dict[str, Any]
) -> None:
    class Own(Patches):
        def _encode(self, images: Tensor, **given: Any) -> Codes:
            return returned

    with pytest.raises(RuntimeError, match=r"^Own\._encode: returned"):
        Own().encode(GOOD, **budget)


@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (2, 1, 4, 4), (2, 3, 16)])
def test_images_against_the_contract_do_not_reach_the_caller(shape: tuple[int, ...]) -> None:
    class Own(Patches):
        def _decode(self, codes: Codes, **given: Any) -> Tensor:
            return torch.zeros(shape)

    with pytest.raises(RuntimeError, match=r"^Own\._decode: returned shape"):
        Own().decode(codes_of([[1], [2]], 512))
