# SPDX-License-Identifier: Apache-2.0
"""`python -m vtc.cli` runs `vtc`."""

from vtc.cli import app

if __name__ == "__main__":
    app()
