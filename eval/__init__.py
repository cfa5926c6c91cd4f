"""Evaluation: the embedded VLM, its generated suite, and the harness around them."""
