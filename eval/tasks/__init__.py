# SPDX-License-Identifier: Apache-2.0
"""Task files for lmms-eval, and the generation of their data."""

OWN_TASKS: tuple[str, ...] = ("vtc_scenes", "vtc_photo", "vtc_mosaic")
"""Tasks whose data is generated here."""
