"""The ranks of an offline tool."""

from dataclasses import replace
from pathlib import Path

import torch

from collectives.communicator import Communicator
from collectives.solo import Solo
from launch import mpi
from launch.detect import detect
from qtp.config import EngineConfig
from qtp.llm import cpu_communicator
from qtp.worker.joining import communicator, share_cores, use_cores


def meet(folder: Path, device: str = "cpu", timeout: float = 300.0) -> Communicator:
    """The ranks of the launcher that started this process, each on its share of the cores; alone if there is none."""
    rendezvous = mpi.meet(detect(timeout))
    config = EngineConfig(model=str(folder), tp=rendezvous.size, device=device, timeout=timeout)
    if rendezvous.size == 1 and device == "cpu":
        return Solo(torch.device("cpu"))
    name = {"cpu": cpu_communicator(config, rendezvous), "cuda": "nccl", "npu": "hccl"}[device]
    comm = communicator(replace(config, communicator="solo" if rendezvous.size == 1 else name), rendezvous)
    if rendezvous.size > 1:
        use_cores(share_cores(config, comm))
    return comm
