"""The app itself, for which any silence is too long once partitions are assigned."""

from __future__ import annotations

import streams.app

streams.app.SILENT_S = -1.0
app = streams.app.app
