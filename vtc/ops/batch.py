# SPDX-License-Identifier: Apache-2.0
"""Several images of equal size at once: what the functions share that take one image or b of them.

Each image gets what it gets alone, up to rounding. A GPU works on all images in lockstep, so that
each step is launched once. On a CPU that pays for few numbers only (`together`): more leave the
cache, and image by image is faster.
"""

from __future__ import annotations

from torch import Tensor

_TOGETHER_UP_TO = 2**18
"""Numbers, of all images, that a CPU works on in lockstep: 1 MiB in fp32."""


def check_shape(name: str, given: Tensor, *sizes: str) -> None:
    """Refuse a tensor that belongs to neither one image nor to several.

    Args:
        name: of the argument, for the message.
        given: must have as many dimensions as there are `sizes`, or one more in front, not empty.
        sizes: names of the sizes of one image's tensor, such as "n", "d".

    Raises:
        ValueError: it has not.
    """
    more = given.ndim - len(sizes)
    if more not in (0, 1) or (more and not len(given)):
        one = ", ".join(sizes)
        raise ValueError(
            f"{name}: expected shape ({one}{',' * (len(sizes) == 1)}) or, of b images, "
            f"(b, {one}), b at least 1, got {tuple(given.shape)}"
        )


def check_fits(name: str, given: Tensor | None, shape: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape than what it belongs to asks for; `None` fits.

    Raises:
        ValueError: it has another.
    """
    if given is not None and given.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(given.shape)}")


def together(given: Tensor, up_to: int = _TOGETHER_UP_TO) -> bool:
    """Whether (b, n, d) is best worked on in lockstep, on a CPU if it holds no more than `up_to`
    numbers; one image, (n, d), always is."""
    return given.ndim < 3 or given.device.type != "cpu" or given.numel() <= up_to


def rows_at(matrix: Tensor, index: Tensor) -> Tensor:
    """(..., k, d) the rows of the (..., n, d) matrix at the (..., k) indices, on the device."""
    if matrix.ndim == 2:
        return matrix.index_select(0, index)
    return matrix.gather(1, index[..., None].expand(*index.shape, matrix.shape[2]))


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    """(..., n) product of the (..., n, d) matrix and the (..., d) vector of each image."""
    if matrix.ndim == 2:
        return matrix.mv(vector)
    # The vector on the left: with one column on the right a CPU takes ten times as long.
    return (vector[:, None] @ matrix.mT).squeeze(1)
