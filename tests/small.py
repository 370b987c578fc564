"""What the tests of several areas share: small rules, and where the repository lies."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from features.config import StateConfig

REPOSITORY: Final = Path(__file__).parents[1]
# Small streams: a few dozen events of a user reach chunks, departures and the duplicate window.
SMALL: Final = StateConfig(recent=8, mid=24, chunk=6, dedup_window=16)
