"""`python -m benchmarks quality`: how well a model ranks, asked through the worker as a host would, beside two other orders."""

from __future__ import annotations

from benchmarks.quality.command import main

__all__ = ["main"]
