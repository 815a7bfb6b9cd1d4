"""A rank that `launch.local` started: `python -m qtp.worker CONFIG`, CONFIG being the resolved EngineConfig as JSON."""

import json
import signal
import sys
from pathlib import Path

from launch.detect import detect
from launch.local import die_with_parent
from qtp.config import EngineConfig, ModelConfig


def main() -> int:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; rank 0 decides
    from qtp.worker.follow import follow  # loads torch, a second in which the parent may end or Ctrl-C be pressed

    config = EngineConfig(**json.loads(sys.argv[1]))
    return follow(config, ModelConfig.load(Path(config.model)), detect(config.timeout))


if __name__ == "__main__":
    sys.exit(main())
