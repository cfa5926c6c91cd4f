# SPDX-License-Identifier: Apache-2.0
"""Running third-party code: its output goes to a file, and it stays offline."""

from __future__ import annotations

import contextlib
import io
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO


class _Log(io.TextIOBase):
    """Receives lmms-eval's prints, logs and progress bars.

    One object for the whole process, as loguru keeps the stream it saw at import.
    """

    target: TextIO | None = None

    def write(self, text: str) -> int:
        if self.target is not None:
            with contextlib.suppress(OSError):  # a full disk must not stop a run for its log
                self.target.write(text)
        return len(text)

    def flush(self) -> None:
        if self.target is not None:
            with contextlib.suppress(OSError):
                self.target.flush()


_LOG = _Log()


@contextlib.contextmanager
def quiet(path: Path) -> Iterator[None]:
    """Redirect output to `path` within the block."""
    file = path.open("a", encoding="utf-8")
    _LOG.target = file
    try:
        with contextlib.redirect_stdout(_LOG), contextlib.redirect_stderr(_LOG):
            yield
    finally:
        _LOG.target = None
        with contextlib.suppress(OSError):
            file.close()


def hub_answers(timeout: float = 3.0) -> bool:
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        request = urllib.request.Request(endpoint, method="HEAD")
        urllib.request.urlopen(request, timeout=timeout).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Hide transformers' progress bars, such as for loading weights, within the block.

    Bars of downloads, which may take minutes, stay.
    """
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # the hub's as well
    if shown:
        enable_progress_bars()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def offline(wanted: bool) -> Iterator[None]:
    """Keep transformers, datasets and the hub client offline within the block.

    The libraries read the environment once, at import, and may already be imported.
    """
    import datasets.config
    import huggingface_hub.constants

    places: list[tuple[Any, str]] = [
        (huggingface_hub.constants, "HF_HUB_OFFLINE"),
        (datasets.config, "HF_HUB_OFFLINE"),
        (datasets.config, "HF_DATASETS_OFFLINE"),
    ]
    before = [getattr(place, name, False) for place, name in places]
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    environment = {name: os.environ.get(name) for name in names}
    if wanted:
        for place, name in places:
            setattr(place, name, True)
        os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for (place, name), value in zip(places, before, strict=True):
            setattr(place, name, value)
        for name, old in environment.items():
            os.environ.pop(name, None)
            if old is not None:
                os.environ[name] = old
