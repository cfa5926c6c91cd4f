# SPDX-License-Identifier: Apache-2.0
"""`python -m vtc.training.atp`."""

from vtc.training.atp.command import main

if __name__ == "__main__":
    main()
