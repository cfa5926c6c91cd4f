# SPDX-License-Identifier: Apache-2.0
"""Messages for unknown names: the likely intended name, and the known ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["meant", "unknown"]


def unknown(name: object, known: Iterable[str], what: str = "name", are: str = "known") -> str:
    """`"unknown name 'todree' (did you mean todre?); known are atp, catp, ..."`.

    Args:
        name: the unknown name.
        known: the known names, in the order in which to list them.
        what: what `name` should be a name of.
        are: how to call the known names, "known" or "accepted".
    """
    names = list(known)
    return f"unknown {what} {name!r}{meant(name, names)}; {are} are {', '.join(names) or 'none'}"


def meant(name: object, known: Iterable[str]) -> str:
    """`" (did you mean todre?)"`, or nothing if `name` is like none of them."""
    by_lower = {other.lower(): other for other in known}
    # Case and hyphens do not matter: "Vision-Zip".
    given = name.lower().replace("-", "_") if isinstance(name, str) else ""
    close = difflib.get_close_matches(given, by_lower, 3)
    return f" (did you mean {' or '.join(by_lower[other] for other in close)}?)" if close else ""
