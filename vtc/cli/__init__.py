# SPDX-License-Identifier: Apache-2.0
"""The command line, one file per command: `vtc eval`, `bench`, `autotune`, `show`, ..."""

from .app import app

__all__ = ["app"]
