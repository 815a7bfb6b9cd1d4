"""Brings ranks 1 to N-1 to life. Imports no torch, so that these ranks can load it while rank 0 does."""

import json
import sys
from dataclasses import asdict

from collectives.rendezvous import Rendezvous
from launch import local, ray_cluster
from launch.watch import Started
from qtp.config import EngineConfig


def launch(config: EngineConfig) -> tuple[Rendezvous, Started]:
    """Starts the other ranks of a resolved `config`, as child processes or as Ray actors. Returns rank 0's Rendezvous, and the
    ranks, which the caller stops."""
    argv = [sys.executable, "-m", "qtp.worker", json.dumps(asdict(config))]
    if config.launcher == "ray":
        resources = {"CPU": float(config.threads or 1)}
        if config.device != "cpu":
            resources["GPU" if config.device == "cuda" else "NPU"] = 1.0
        return ray_cluster.start(config.tp, argv, config.timeout, address=config.ray_address, resources=resources)
    return local.start(config.tp, argv, config.timeout)
