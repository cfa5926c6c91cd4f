# SPDX-License-Identifier: Apache-2.0
"""Numbers for reading."""

from __future__ import annotations

import math

import pytest

from vtc.core.figures import counted, three_digits


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.5, "0.500"), (0.485, "0.485"), (2.4, "2.40"), (9.996, "10.0"), (12.34, "12.3"),
        (999.6, "1000"), (1234.5, "1234"), (0.00321, "0.00321"), (0.0, "0"), (-0.5, "-0.500"),
        (math.nan, "nan"),
    ],
)  # fmt: skip
def test_numbers_of_a_column_have_three_digits(value: float, text: str) -> None:
    assert three_digits(value) == text


def test_one_and_many() -> None:
    assert [counted(n, "image") for n in (0, 1, 2)] == ["0 images", "1 image", "2 images"]
