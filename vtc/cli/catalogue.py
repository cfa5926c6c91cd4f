# SPDX-License-Identifier: Apache-2.0
"""The description of each method, available without importing PyTorch.

`vtc methods` answers in well under a second because `catalogue.json` holds what the classes say. It
also holds a digest of the files that define them: after an edit the classes are read instead, until
`python -m vtc.cli.catalogue` (`make catalogue`) rewrites the file. `make lint` fails if that is
due.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vtc.core import Method

_PACKAGE = Path(__file__).parents[1]
_FILE = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class Entry:
    """One method.

    Attributes:
        name, title, paper, year, trained: as in `vtc.Method`.
        stages: the stages it implements.
        reads: signals of the tower and of the decoder that it requests.
        settings: `name=default`, or only the name if there is no default.
    """

    name: str
    title: str
    paper: str
    year: int | None
    trained: bool
    stages: tuple[str, ...]
    reads: tuple[str, ...]
    settings: tuple[str, ...]


def catalogue(live: bool = False) -> list[Entry]:
    """All registered methods in alphabetical order.

    Args:
        live: read the classes instead of the file, which lacks those of other packages.
    """
    if not live and (rows := _written()) is not None:
        return [_entry(row) for row in rows]
    import vtc

    return [_described(name, cls) for name, cls in vtc.methods().items()]


def _written() -> list[dict[str, Any]] | None:
    """The rows of the file, or `None` if it is missing, damaged or older than the methods."""
    try:
        found = json.loads(_FILE.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found["methods"] if found.get("digest") == _digest() else None


def _entry(row: dict[str, Any]) -> Entry:
    return Entry(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()})  # type: ignore[arg-type]


def _digest() -> str:
    """Digest of the files that define methods, regardless of line endings."""
    found = hashlib.sha256()
    files = (path for room in ("core", "methods") for path in (_PACKAGE / room).rglob("*.py"))
    for path in sorted(files):
        found.update(path.relative_to(_PACKAGE).as_posix().encode())
        found.update(path.read_bytes().replace(b"\r\n", b"\n"))
    return found.hexdigest()


_DEPTH_ASKED_FOR = 32
_OF_THE_DECODER = {
    "taps": "decoder attention",
    "peeks": "decoder attention ahead",
    "records": "decoder states",
}


def _described(name: str, cls: type[Method]) -> Entry:
    from vtc.core.stages import STAGES

    method: Method | None
    try:
        method = cls()
        stages = method.stages
    except (TypeError, ValueError):  # it has required settings
        method = None
        stages = tuple(stage.name for stage in STAGES if cls.implements(stage.hook))
    reads: list[str] = [*sorted(cls.needs)]
    for hook, what in _OF_THE_DECODER.items():
        # For a method with required settings, see which hooks it overrides.
        asks = (
            hook in vars(cls) if method is None else bool(getattr(method, hook)(_DEPTH_ASKED_FOR))
        )
        reads += [what] * asks
    settings = []
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.init:
            default = "" if field.default is dataclasses.MISSING else f"={short(field.default)}"
            settings.append(f"{field.name}{default}")
    return Entry(
        name, cls.title, cls.paper, cls.year, cls.trained, stages, tuple(reads), tuple(settings)
    )


def short(value: Any) -> str:
    """A setting for display: fractions to four digits. All is 1.0, as 1 would be one token."""
    if isinstance(value, tuple):
        return "(" + ", ".join(map(short, value)) + ")"
    if not isinstance(value, float):
        return str(value)
    text = f"{value:.4g}"
    return text if not text.lstrip("-").isdecimal() else f"{text}.0"


def write() -> None:
    """Rewrite the file."""
    rows = [dataclasses.asdict(entry) for entry in catalogue(live=True)]
    text = json.dumps({"digest": _digest(), "methods": rows}, indent=1, ensure_ascii=False)
    _FILE.write_text(text + "\n", "utf-8", newline="\n")


if __name__ == "__main__":
    if "--check" not in sys.argv[1:]:
        write()
    elif _written() is None:
        sys.exit(f"{_FILE.name} is out of date: run `make catalogue`")
