"""What a rank does before it reads weights: device, communicator, cores, and its place on the control channel.

The communicator comes first, and the control channel's endpoint is broadcast over it, so that every launcher need only say
where the ranks meet.
"""

import hashlib
import importlib
import os
import socket
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

import collectives
from collectives.communicator import Communicator
from collectives.network import machine_identity
from collectives.rendezvous import Rendezvous
from launch import affinity, mpi
from launch.local import new_token
from qtp.config import EngineConfig, ModelConfig
from qtp.weights.checkpoint import open_checkpoint

_ENDPOINT_BYTES = 64
_PLACE_BYTES = 96
_ONE_A_RANK = ("nccl", "hccl")


def communicator(config: EngineConfig, rendezvous: Rendezvous) -> Communicator:
    """Joins the other ranks, on this rank's device."""
    try:
        device = use_device(config, rendezvous)
    except ValueError:
        if rendezvous.listener is not None:
            os.close(rendezvous.listener)
        raise
    comm = collectives.create(config.communicator, rendezvous, device)
    if "mpi" not in config.communicator:
        mpi.part()
    return comm


def use_device(config: EngineConfig, rendezvous: Rendezvous) -> torch.device:
    """This rank's device, made the current one. Where the host has fewer than it has ranks, ranks share them in turn; ValueError
    if the communicator is of those that want a device a rank."""
    if config.device == "cpu":
        return torch.device("cpu")
    if config.device == "npu":
        try:
            importlib.import_module("torch_npu")  # teaches torch the name
        except ImportError as error:
            raise ValueError(
                f"device npu needs torch_npu ({error}); install the one for this torch, or use --device cpu"
            ) from None
    module = torch.get_device_module(config.device)
    found = module.device_count()
    few = rendezvous.local_size > found and config.communicator in _ONE_A_RANK
    shown_its_own = found == 1 and config.communicator == "nccl"  # perhaps, by the launcher: nccl will know
    if not found or (few and not shown_its_own):
        raise ValueError(
            f"{rendezvous.local_size} ranks on this host need as many {config.device} devices for communicator "
            f"{config.communicator!r}, and it has {found}; start fewer, let them share with --communicator gloo, or use --device "
            "cpu"
        )
    device = torch.device(config.device, rendezvous.local_rank % found)
    module.set_device(device)
    return device


def share_cores(config: EngineConfig, comm: Communicator) -> affinity.Cores:
    """This rank's share of the cores that it and the other ranks of its host may use, or config.threads threads; unless
    config.bind_cpu is off, cores of its own. All ranks must call it."""
    mine = affinity.allowance()
    place = (machine_identity() or socket.gethostname()).encode()[:_PLACE_BYTES].ljust(_PLACE_BYTES, b"\0")
    row = torch.frombuffer(bytearray(place + mine.pack()), dtype=torch.uint8).to(comm.device)
    rows = [bytes(told.tolist()) for told in comm.all_gather(row[None])]
    comm.check()
    allowances = [affinity.Allowance.unpack(told[_PLACE_BYTES:]) for told in rows]
    cores = affinity.share(comm.rank, [told[:_PLACE_BYTES] for told in rows], allowances, affinity.topology())
    return replace(cores, threads=config.threads or cores.threads, cores=cores.cores if config.bind_cpu else frozenset())


def use_cores(cores: affinity.Cores) -> Callable[[], None]:
    """Binds the calling thread, which is the one that will work, to `cores`. Returns what undoes it; the number of threads, which
    torch keeps for each thread, comes back where that is called."""
    before = torch.get_num_threads()
    release = affinity.bind(cores)
    torch.set_num_threads(cores.threads)

    def undo() -> None:
        release()
        if torch.get_num_threads() == cores.threads:
            torch.set_num_threads(before)

    return undo


def fingerprint(config: EngineConfig, model: ModelConfig) -> str:
    """A digest of all that must be the same on every rank: the settings, the model's config and the weight files (their headers,
    sizes and a sample). Where the folder lies and what only concerns one host is left out."""
    settings = {**asdict(config), "model": "", "threads": 0, "ray_address": "", "launcher": ""}
    content = f"{settings}{replace(model, moe=None)}{_moe_text(model)}"
    if config.load_format != "dummy":
        with open_checkpoint(Path(config.model), model.weight_files) as store:
            content += store.fingerprint()
    return hashlib.sha256(content.encode()).hexdigest()


def _moe_text(model: ModelConfig) -> str:
    return "" if model.moe is None else f"{replace(model.moe, layers=frozenset())}{sorted(model.moe.layers)}"


def tell_endpoint(comm: Communicator, port: int, token: str) -> None:
    """Rank 0 tells the others the control channel's port, and the token if their launcher gave them none ("" otherwise)."""
    text = f"{port}:{token}".encode()
    comm.broadcast(torch.tensor(list(text.ljust(_ENDPOINT_BYTES)), dtype=torch.uint8, device=comm.device))


def hear_endpoint(comm: Communicator) -> tuple[int, str]:
    """What rank 0 tells: (port, token or "")."""
    told = comm.broadcast(torch.zeros(_ENDPOINT_BYTES, dtype=torch.uint8, device=comm.device))
    port, _, token = bytes(told.tolist()).decode().strip().partition(":")
    return int(port), token


def token_of(rendezvous: Rendezvous) -> tuple[str, str]:
    """(the secret of this run, what of it must be told): made here if the launcher gave none."""
    if rendezvous.token:
        return rendezvous.token, ""
    token = new_token()
    return token, token
