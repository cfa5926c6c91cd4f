# SPDX-License-Identifier: Apache-2.0
"""Helpers of functions that take one image or a batch of b images of equal size.

Each image gets the same result as alone, up to rounding. A GPU processes all images in lockstep, so
that each step is launched once. On a CPU this pays only for little data (`together`): more does not
fit the cache, and image by image is faster.
"""

from __future__ import annotations

from torch import Tensor

from vtc.core.errors import ArgumentError

_TOGETHER_UP_TO = 2**18
"""Limit of values, over all images, that a CPU processes in lockstep: 1 MiB in fp32."""


def check_shape(name: str, given: Tensor, *sizes: str) -> None:
    """Refuse a tensor that has neither the shape for one image nor for several.

    Args:
        name: the argument, for the message.
        given: must have as many dimensions as there are `sizes`, or one more in front, not empty.
        sizes: names of the sizes of one image's tensor, such as "n", "d".

    Raises:
        ArgumentError: it has other dimensions.
    """
    more = given.ndim - len(sizes)
    if more not in (0, 1) or (more and not len(given)):
        one = ", ".join(sizes)
        raise ArgumentError(
            name,
            f"expected shape ({one}{',' * (len(sizes) == 1)}) or, for b images, "
            f"(b, {one}), b at least 1, got {tuple(given.shape)}",
        )


def check_count(name: str, value: int, lowest: int, n: int, what: str = "tokens") -> None:
    """Refuse numbers outside of `lowest` to `n`.

    Raises:
        ArgumentError: for the argument `name`.
    """
    if not lowest <= value <= n:
        raise ArgumentError(
            name, f"expected a whole number from {lowest} to the {n} {what} given, got {value}"
        )


def check_fits(name: str, given: Tensor | None, shape: tuple[int, ...]) -> None:
    """Refuse a tensor whose shape differs from `shape`; `None` fits.

    Raises:
        ArgumentError: the shapes differ.
    """
    if given is not None and given.shape != shape:
        raise ArgumentError(name, f"expected shape {tuple(shape)}, got {tuple(given.shape)}")


def together(given: Tensor, up_to: int = _TOGETHER_UP_TO) -> bool:
    """Whether to process (b, n, d) in lockstep, on a CPU if it holds at most `up_to` values; one
    image, (n, d), always is."""
    return given.ndim < 3 or given.device.type != "cpu" or given.numel() <= up_to


def rows_at(matrix: Tensor, index: Tensor) -> Tensor:
    """(..., k, d) rows of the (..., n, d) matrix at the (..., k) indices, on the device."""
    if matrix.ndim == 2:
        return matrix.index_select(0, index)
    return matrix.gather(1, index[..., None].expand(*index.shape, matrix.shape[2]))


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    """(..., n) product of the (..., n, d) matrix and the (..., d) vector of each image."""
    if matrix.ndim == 2:
        return matrix.mv(vector)
    # The vector goes on the left: as a single column on the right it is ten times slower on a CPU.
    return (vector[:, None] @ matrix.mT).squeeze(1)
