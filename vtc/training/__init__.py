# SPDX-License-Identifier: Apache-2.0
"""Training of the methods that need trained weights: one loop, and a folder or file a method."""
