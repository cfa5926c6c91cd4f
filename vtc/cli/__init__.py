# SPDX-License-Identifier: Apache-2.0
"""The command line, one file a command: `vtc eval | bench | autotune | reproduce | show | ...`."""

from .app import app

__all__ = ["app"]
