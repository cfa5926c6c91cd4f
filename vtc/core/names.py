# SPDX-License-Identifier: Apache-2.0
"""What to say of a name that is not known: which one may have been meant, and which there are."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["meant", "unknown"]


def unknown(name: object, known: Iterable[str], what: str = "name", are: str = "known") -> str:
    """`"unknown name 'todree' (did you mean todre?); known are atp, catp, ..."`.

    Args:
        name: what was given.
        known: what there is, in the order in which it is to be listed.
        what: what `name` was given as.
        are: what they are, "known" or "accepted".
    """
    names = list(known)
    return f"unknown {what} {name!r}{meant(name, names)}; {are} are {', '.join(names) or 'none'}"


def meant(name: object, known: Iterable[str]) -> str:
    """`" (did you mean todre?)"`, or nothing if `name` is like none of them."""
    by_lower = {other.lower(): other for other in known}
    # In other letters, and with other joints, it is the same name: "Vision-Zip".
    given = name.lower().replace("-", "_") if isinstance(name, str) else ""
    close = difflib.get_close_matches(given, by_lower, 3)
    return f" (did you mean {' or '.join(by_lower[other] for other in close)}?)" if close else ""
