"""A sink in a process of its own, to be killed: `python sink_child.py BOOTSTRAP TOPIC ROOT`."""

from __future__ import annotations

import sys
from pathlib import Path

from streams.kafka import KafkaConfig
from streams.lake import LakeSink

if __name__ == "__main__":
    bootstrap, topic, root = sys.argv[1:]
    # Small and frequent files: more moments to be killed at.
    LakeSink(KafkaConfig(bootstrap), topic, Path(root), flush_s=0.01).run()
