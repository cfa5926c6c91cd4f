# SPDX-License-Identifier: Apache-2.0
"""Numbers formatted for reading."""

from __future__ import annotations

import math

__all__ = ["counted", "three_digits"]


def three_digits(value: float) -> str:
    """`value` to three digits, or all digits before the point if more: 0.500, 12.3, 1234."""
    if not math.isfinite(value) or value == 0:
        return f"{value:.0f}"
    rounded = float(f"{value:.2e}")  # 9.996 is 10.0 and not 10.00
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(rounded))))}f}"


def counted(number: int, what: str) -> str:
    """`"1 image"`, `"2 images"`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
