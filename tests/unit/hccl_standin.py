"""A stand-in for torch_npu whose process group does, on host memory, what the sources of ProcessGroupHCCL say, and the adapter on
top of it. Runs in a process of its own, ranks as threads, since the device name npu cannot be taken back. Prints JSON.

Results appear only when the work is waited for; a tensor that is not contiguous and a sum of a dtype that HCCL does not add are
refused in its words; half precision is added in half precision. Bytes travel through the store that the adapter hands over, so
groups whose stores are not apart would read each other's.
"""

import json
import socket
import sys
import threading
import traceback
import types
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "conformance"))

from communicator_cases import CASES

from collectives import CollectiveError, Communicator, Rendezvous, create

ADDS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.bfloat16)
LEFT_OUT = ("checked_tells_who_disagrees",)
NAMES = {torch.uint8: "at::kByte/at::kBool", torch.bool: "at::kByte/at::kBool", torch.float64: "at::kDouble"}


class Work:
    def __init__(self, finish: Callable[[], None]) -> None:
        self._finish = finish

    def wait(self) -> bool:
        self._finish()
        return True


class Options:
    """Only what the real one has can be set."""

    __slots__ = ("_timeout", "global_ranks_in_group", "group_id", "hccl_config", "is_high_priority_stream", "op_timeout")


class ProcessGroupHCCL:
    Options = Options
    made: list["ProcessGroupHCCL"] = []  # noqa: RUF012  # by all threads

    def __init__(self, store: Any, rank: int, size: int, options: Options) -> None:
        assert isinstance(store, dist.PrefixStore)
        assert isinstance(options, Options)
        self.store, self.rank, self.size, self.options = store, rank, size, options
        self.calls: list[str] = []
        self.turn = 0
        ProcessGroupHCCL.made.append(self)

    def _note(self, op: str, *tensors: Tensor) -> None:
        for x in tensors:
            if not x.is_contiguous():
                raise RuntimeError("Tensors must be contiguous")
        self.calls.append(" ".join([op, *(f"{str(x.dtype)[6:]}{list(x.shape)}" for x in tensors)]))

    def _exchange(self, x: Tensor) -> list[Tensor]:
        self.turn += 1
        flat = x.as_strided((x.numel(),), (1,))
        self.store.set(f"{self.turn}/{self.rank}", flat.view(torch.uint8).numpy().tobytes())
        rows = [self.store.get(f"{self.turn}/{rank}") for rank in range(self.size)]
        return [torch.frombuffer(bytearray(row), dtype=x.dtype).reshape(x.shape) for row in rows]

    def _summed(self, x: Tensor) -> Tensor:
        rows = self._exchange(x)
        total = rows[0]
        for row in rows[1:]:
            total = total + row
        return total

    def _adds(self, x: Tensor) -> None:
        if x.dtype not in ADDS:
            raise RuntimeError(f"HCCL AllReduce & Reduce: Unsupported data type {NAMES[x.dtype]}")

    def allreduce(self, tensors: list[Tensor]) -> Work:
        (x,) = tensors
        self._note("allreduce", x)
        self._adds(x)
        return Work(lambda: x.copy_(self._summed(x)))

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor]) -> Work:
        ((*rows,), (x,)) = outputs, inputs
        self._note("allgather", x)
        assert len(rows[0]) == self.size
        assert all(row.shape == x.shape and row.dtype == x.dtype and row.is_contiguous() for row in rows[0])

        def finish() -> None:
            for row, found in zip(rows[0], self._exchange(x), strict=True):
                row.copy_(found)

        return Work(finish)

    def broadcast(self, tensors: list[Tensor], options: Any) -> Work:
        (x,) = tensors
        self._note(f"broadcast from {options.rootRank}", x)
        return Work(lambda: x.copy_(self._exchange(x)[options.rootRank]))

    def _reduce_scatter_base(self, output: Tensor, whole: Tensor) -> Work:
        self._note("_reduce_scatter_base", output, whole)
        self._adds(whole)
        if output.dtype != whole.dtype:
            raise RuntimeError("input tensor must be the same type as the output tensor.")
        if whole.numel() != output.numel() * self.size:
            raise RuntimeError("input tensor must be the same size as output size times world size")
        return Work(lambda: output.copy_(self._summed(whole).reshape(self.size, -1)[self.rank].reshape(output.shape)))

    def alltoall_base(self, output: Tensor, sent: Tensor, output_sizes: Sequence[int], sizes: Sequence[int]) -> Work:
        self._note(f"alltoall_base {output_sizes} {sizes}", output, sent)
        if sent.shape[0] % self.size or output.dtype != sent.dtype or output.numel() != sent.numel():
            raise RuntimeError("Tensor's dim 0 does not divide equally across group size")

        def finish() -> None:
            rows = [row.reshape(self.size, -1)[self.rank] for row in self._exchange(sent)]
            output.copy_(torch.stack(rows).reshape(output.shape))

        return Work(finish)

    def barrier(self) -> Work:
        self._note("barrier")
        return Work(lambda: self._exchange(torch.ones(1)) and None)

    def abort_hccl_comm(self, reason: str) -> None:
        self.calls.append(f"abort_hccl_comm {reason}")


def install() -> None:
    torch.utils.rename_privateuse1_backend("npu")
    c10d = types.SimpleNamespace(ProcessGroupHCCL=ProcessGroupHCCL)
    module = types.ModuleType("torch_npu")
    module._C = types.SimpleNamespace(_distributed_c10d=c10d)  # type: ignore[attr-defined]
    sys.modules["torch_npu"] = module


def on_ranks(size: int, call: Callable[[Communicator], Any]) -> list[Any]:
    """`call` on each rank, in a thread; what it returned, or its traceback."""
    listener = socket.create_server(("127.0.0.1", 0))
    port, descriptor = listener.getsockname()[1], listener.detach()
    results: list[Any] = ["hangs"] * size

    def run(rank: int) -> None:
        rendezvous = Rendezvous(
            rank=rank,
            size=size,
            local_rank=rank,
            local_size=size,
            port=port,
            listener=descriptor if rank == 0 else None,
            timeout=41.0,
        )
        try:
            with create("hccl", rendezvous, torch.device("npu", rank)) as comm:
                results[rank] = call(comm)
        except BaseException:
            results[rank] = traceback.format_exc()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    return results


def failing(call: Callable[[], object]) -> str:
    try:
        call()
    except (ValueError, CollectiveError) as error:
        return f"{type(error).__name__}: {error}"
    return "raised nothing"


def script(comm: Communicator) -> dict[str, Any]:
    """One call of each kind, and what the process group saw of it."""
    group = comm._group  # type: ignore[attr-defined]
    r = comm.rank + 1
    told: dict[str, Any] = {"rank": group.rank, "size": group.size, "device": str(comm.device)}
    told["options"] = [group.options.is_high_priority_stream, group.options._timeout == timedelta(seconds=41.0)]
    told["sum"] = comm.all_reduce(torch.full((3,), 1.5 * r)).tolist()
    told["half sum"] = comm.all_reduce(torch.full((2, 2), 257.0 * r, dtype=torch.bfloat16)).tolist()
    told["strided sum"] = comm.all_reduce(torch.arange(8, dtype=torch.int32)[1::2] * r).tolist()
    told["gather"] = comm.all_gather(torch.full((1, 2), r, dtype=torch.int64), 1).tolist()
    told["uneven"] = comm.all_gather(torch.full((r,), r, dtype=torch.int8), 0, [1, 2]).tolist()
    told["scatter"] = comm.reduce_scatter(torch.arange(1.0, 5.0) * r).tolist()
    told["half scatter"] = comm.reduce_scatter(torch.arange(1, 5).to(torch.float16)[:, None].expand(4, 2) * r).tolist()
    told["broadcast"] = comm.broadcast(torch.full((2,), r, dtype=torch.uint8), 1).tolist()
    told["exchange"] = [x.tolist() for x in comm.all_to_all([torch.tensor([10 * r + to]) for to in (1, 2)])]
    comm.barrier()
    told["refused"] = [
        failing(lambda dtype=dtype: comm.all_reduce(torch.ones(2, dtype=dtype)))  # type: ignore[misc]
        for dtype in (torch.float64, torch.uint8, torch.bool)
    ]
    told["calls"] = list(group.calls)
    first, second = comm.split([0, 1]), comm.split([1])
    assert first is not None
    told["split"] = [first.all_reduce(torch.tensor([7 * r])).tolist(), None if second is None else (second.rank, second.size)]
    told["apart"] = first._group is not group  # type: ignore[attr-defined]
    first.abort()
    told["aborted"] = first._group.calls[-1]  # type: ignore[attr-defined]
    return told


def conformance(size: int) -> dict[str, list[str]]:
    """Every case that makes no tensor on the device by itself; CPU tensors stand for those of the device."""
    results: dict[str, list[str]] = {}
    for name, case in CASES.items():
        if name in LEFT_OUT:
            continue
        shared = Path(sys.argv[1]) / f"{size}-{name}"
        shared.mkdir()

        def call(comm: Communicator, case: Any = case, shared: Path = shared) -> str:
            case(comm, shared)
            return "ok"

        results[name] = on_ranks(size, call)
    return results


def main() -> None:
    torch.set_num_threads(1)
    missing = failing(lambda: create("hccl", Rendezvous(), torch.device("cpu")))
    install()
    print(
        json.dumps(
            {
                "missing": missing,
                "cpu": failing(lambda: create("hccl", Rendezvous(port=free_port()), torch.device("cpu"))),
                "script": on_ranks(2, script),
                "conformance": {str(size): conformance(size) for size in (1, 2, 3)},
            }
        )
    )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
