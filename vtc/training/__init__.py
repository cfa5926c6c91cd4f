# SPDX-License-Identifier: Apache-2.0
"""Training loops of the methods that need trained weights."""
