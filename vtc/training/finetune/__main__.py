# SPDX-License-Identifier: Apache-2.0
"""`python -m vtc.training.finetune`."""

from vtc.training.finetune.command import main

if __name__ == "__main__":
    main()
