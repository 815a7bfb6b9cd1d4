"""Cores and threads of a rank.

Each rank tells the others what it is allowed (`allowance`), and each then computes for itself which cores are its own (`share`).
OMP_NUM_THREADS is not asked: torchrun sets it to 1 by itself.

A core here is what the system calls a CPU, a logical core; those of one physical core are siblings. One thread a physical core
is used: siblings share the units that multiply, so a second thread there adds nothing to a matrix product but waiting at its
barriers (pytorch.org, "Grokking PyTorch Intel CPU performance from first principles"; vLLM's CPU backend binds alike).
"""

import os
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path

MAX_CORES = 4096
_PACKED = struct.Struct(f"<d{MAX_CORES // 8}s")
_ROOT = Path("/")

Unit = frozenset[int]


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a process may use: the cores it may run on (at least one, numbered below MAX_CORES), and how many cores' worth of
    time its cgroup grants (`inf`: no limit)."""

    cores: frozenset[int]
    quota: float = inf

    PACKED = _PACKED.size

    def pack(self) -> bytes:
        """PACKED bytes."""
        bits = sum(1 << core for core in self.cores)
        return _PACKED.pack(self.quota, bits.to_bytes(MAX_CORES // 8, "little"))

    @staticmethod
    def unpack(data: bytes) -> "Allowance":
        """The reverse of pack. ValueError for anything else."""
        if len(data) != _PACKED.size:
            raise ValueError(f"an allowance of cores has {_PACKED.size} bytes, not {len(data)}")
        quota, packed = _PACKED.unpack(data)
        bits = int.from_bytes(packed, "little")
        if not bits or not quota > 0:
            raise ValueError(f"an allowance of {bits.bit_count()} cores and a quota of {quota:g} makes no sense")
        return Allowance(frozenset(core for core in range(bits.bit_length()) if bits >> core & 1), quota)


@dataclass(frozen=True, slots=True)
class Topology:
    """nodes: (number, cores) of each NUMA node that has cores, by number; siblings: the cores of each physical core."""

    nodes: tuple[tuple[int, Unit], ...]
    siblings: tuple[Unit, ...]


@dataclass(frozen=True, slots=True)
class Cores:
    """A rank's share. cores: those it is pinned to (none: it is not pinned); nodes: the NUMA nodes they belong to."""

    cores: frozenset[int]
    threads: int
    nodes: tuple[int, ...] = ()


def allowance(root: Path = _ROOT) -> Allowance:
    """What this thread may use, whatever `bind` has left it. `root`: where /proc and /sys are."""
    allowed = _BINDINGS[0].before if _BINDINGS else _allowed()
    return Allowance(frozenset(core for core in allowed if core < MAX_CORES), _quota(root))


def topology(root: Path = _ROOT) -> Topology:
    """This machine's. Where /sys does not tell, all cores are of one node, and each is a physical core."""
    system = root / "sys/devices/system"
    nodes = []
    for folder in sorted((system / "node").glob("node[0-9]*"), key=lambda folder: int(folder.name[4:])):
        if cores := _listed(folder / "cpulist"):  # a node may have memory alone
            nodes.append((int(folder.name[4:]), cores))
    siblings = set()
    for folder in (system / "cpu").glob("cpu[0-9]*"):
        told = folder / "topology"
        core = int(folder.name[3:])
        siblings.add(_listed(told / "core_cpus_list") or _listed(told / "thread_siblings_list") or frozenset({core}))
    known = frozenset().union(*siblings) or frozenset(range(os.cpu_count() or 1))
    siblings |= {frozenset({core}) for core in known.difference(*siblings)}
    return Topology(tuple(nodes) or ((0, known),), tuple(sorted(siblings, key=min)))


def share(rank: int, machines: Sequence[str | bytes], allowances: Sequence[Allowance], topology: Topology) -> Cores:
    """The share of `rank`, disjoint from that of every other rank of its machine. Every rank of a machine must give the same
    `machines` and `allowances` (one each a rank) and, as `topology`, its machine's. Equal strings mean the same machine.

    Ranks that are allowed the same cores share them out: see `_shared`. A launcher that has pinned each rank to cores of its own
    is thereby respected. Where allowed sets overlap in part, each core goes to one of the ranks that may use it, so that whoever
    has least gets next.

    A quota is taken to be of one cgroup that holds all ranks of the machine with that quota, and bounds their threads: a quota of
    4 cores makes 2 threads for each of 2 ranks. Every rank has at least one thread.
    """
    here = [r for r, machine in enumerate(machines) if machine == machines[rank]]
    groups: dict[frozenset[int], list[int]] = {}
    for r in here:
        groups.setdefault(allowances[r].cores, []).append(r)
    mine = allowances[rank]
    together = groups[mine.cores]
    cores, threads = _shared(_dealt(groups, topology)[mine.cores], len(together), topology)[together.index(rank)]
    if mine.quota < inf:
        alike = sum(allowances[r].quota == mine.quota for r in here)
        threads = max(1, min(threads, int(mine.quota / alike + 1e-6)))
    return Cores(cores, threads, tuple(number for number, node in topology.nodes if node & cores))


@dataclass(slots=True, eq=False)
class _Binding:
    before: set[int]


_BINDINGS: list[_Binding] = []  # those in force, oldest first: where threads may run is a state of the process, not of a run


def bind(cores: Cores) -> Callable[[], None]:
    """Pins the calling thread, and thereby the threads that it starts later, to `cores`. Returns what undoes it, for those
    threads too, from any thread and in any order with other bindings: what was before all of them comes back with the end of
    the last. Does nothing where `cores` names none or the system cannot pin. ValueError if it will not."""
    if not cores.cores or not hasattr(os, "sched_setaffinity"):
        return lambda: None
    thread = threading.get_native_id()
    binding = _Binding(os.sched_getaffinity(thread))
    try:
        os.sched_setaffinity(thread, cores.cores)
    except OSError as error:
        raise ValueError(f"cores {_text(cores.cores)} cannot be bound ({error.strerror}); use --bind-cpu 0") from None
    _BINDINGS.append(binding)
    after = os.sched_getaffinity(thread)

    def restore() -> None:
        place = _BINDINGS.index(binding)
        del _BINDINGS[place]
        if place < len(_BINDINGS):
            _BINDINGS[place].before = binding.before
            return
        for each in (thread, *_threads()):
            try:
                if os.sched_getaffinity(each) == after:
                    os.sched_setaffinity(each, binding.before)
            except OSError:  # that thread has ended
                pass

    return restore


@contextmanager
def unbound() -> Iterator[None]:
    """While in it, the calling thread runs where it might before it was bound, and so do processes that it starts."""
    if not _BINDINGS:
        yield
        return
    bound = os.sched_getaffinity(0)
    os.sched_setaffinity(0, _BINDINGS[0].before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, bound)


def describe(cores: Cores) -> str:
    """Such as '2 threads on cores 0-1 (NUMA node 0)'."""
    threads = f"{cores.threads} thread{'s'[: cores.threads > 1]}"
    if not cores.cores:
        return f"{threads}, not pinned"
    where = f"core{'s'[: len(cores.cores) > 1]} {_text(cores.cores)}"
    nodes = f" (NUMA node{'s'[: len(cores.nodes) > 1]} {_text(cores.nodes)})" if cores.nodes else ""
    return f"{threads} on {where}{nodes}"


def threads_per_rank(local_size: int) -> int:
    """Threads for each of `local_size` ranks of this machine that are all allowed what this process is."""
    told = allowance()
    return share(local_size - 1, ["here"] * local_size, [told] * local_size, topology()).threads


def _dealt(groups: dict[frozenset[int], list[int]], topology: Topology) -> dict[frozenset[int], frozenset[int]]:
    """For each set of allowed cores, those that its ranks get. They differ only where sets overlap in part."""
    wanting = Counter(core for allowed in groups for core in allowed)
    dealt = {allowed: {core for core in allowed if wanting[core] == 1} for allowed in groups}
    contested: dict[tuple[Unit, tuple[frozenset[int], ...]], set[int]] = {}
    physical = {core: unit for unit in topology.siblings for core in unit}
    for core, count in wanting.items():
        if count > 1:
            takers = tuple(allowed for allowed in groups if core in allowed)
            contested.setdefault((physical.get(core, frozenset({core})), takers), set()).add(core)
    left = sorted(((takers, unit) for (_, takers), unit in contested.items()), key=lambda c: (len(c[0]), min(c[1])))
    while left:
        neediest = min(
            {allowed for takers, _ in left for allowed in takers},
            key=lambda allowed: (len(dealt[allowed]) / len(groups[allowed]), len(allowed), groups[allowed][0]),
        )
        got = next(i for i, (takers, _) in enumerate(left) if neediest in takers)
        dealt[neediest] |= left.pop(got)[1]
    return {allowed: frozenset(cores) for allowed, cores in dealt.items()}


def _shared(cores: frozenset[int], count: int, topology: Topology) -> list[tuple[frozenset[int], int]]:
    """(cores, threads) of each of `count` ranks that share `cores`: whole physical cores, one thread on each. Ranks of one NUMA
    node get the same number, and what is left over stays free.

    No rank straddles two nodes, unless there are fewer ranks than nodes and every rank gains cores by it. More ranks than
    physical cores get logical cores and a thread each; more than logical cores are not pinned.
    """
    if count > len(cores):
        return [(frozenset(), 1)] * count
    nodes = _units(cores, topology)
    threaded = count <= sum(map(len, nodes))
    if not threaded:
        nodes = [_split(units) for units in nodes]
    parts = _within_nodes(nodes, count)
    if count < len(nodes):
        whole = _whole_nodes(nodes, count)
        if min(map(len, whole)) > min(map(len, parts)):
            parts = whole
    return [(frozenset().union(*units), len(units) if threaded else 1) for units in parts]


def _units(cores: frozenset[int], topology: Topology) -> list[list[Unit]]:
    """What of `cores` each node has, as physical cores. Cores that the topology does not know are a node of their own."""
    homes = [node for _, node in topology.nodes]
    homes.append(cores.difference(*homes))
    nodes = []
    for node in homes:
        left = cores & node
        units = [unit & left for unit in topology.siblings if unit & left]
        units += [frozenset({core}) for core in left.difference(*units)]
        if units:
            nodes.append(sorted(units, key=min))
    return nodes


def _split(units: list[Unit]) -> list[Unit]:
    """The logical cores of `units`: the first of each, then the second of each, and so on."""
    places = sorted((place, core) for unit in units for place, core in enumerate(sorted(unit)))
    return [frozenset({core}) for _, core in places]


def _within_nodes(nodes: list[list[Unit]], count: int) -> list[list[Unit]]:
    """Cuts each node for some of the ranks, the first nodes for the first ranks: so that the rank with least has as much as can
    be, and otherwise every node is used and ranks are as even as can be."""
    sizes = [len(units) for units in nodes]
    least = max(part for part in range(1, max(sizes) + 1) if sum(size // part for size in sizes) >= count)
    ranks = [0] * len(nodes)
    for _ in range(count):
        open_nodes = [j for j, size in enumerate(sizes) if ranks[j] < size // least]
        ranks[min(open_nodes, key=lambda j: (ranks[j] > 0, -sizes[j] / (ranks[j] + 1), j))] += 1
    parts = []
    for units, sharing in zip(nodes, ranks, strict=True):
        each = len(units) // max(1, sharing)
        parts += [units[i * each : (i + 1) * each] for i in range(sharing)]
    return parts


def _whole_nodes(nodes: list[list[Unit]], count: int) -> list[list[Unit]]:
    """Neighbouring nodes for each rank, as even as whole nodes allow. A rank may get none."""
    parts: list[list[Unit]] = [[] for _ in range(count)]
    total, before = sum(map(len, nodes)), 0
    for units in nodes:
        parts[(2 * before + len(units)) * count // (2 * total)] += units
        before += len(units)
    return parts


def _allowed() -> Iterable[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


def _threads() -> list[int]:
    """This process's threads, where the system tells."""
    try:
        return [int(name) for name in os.listdir("/proc/self/task")]
    except OSError:
        return []


def _quota(root: Path) -> float:
    """The least that this process's cgroup or one above it grants: cpu.max of version 2, cpu.cfs_quota_us of version 1."""
    least = inf
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        limit = _limit_1 if controllers else _limit_2
        steps = path.strip().split("/")[1:]
        for mount in (controllers, "cpu") if controllers else ("", "unified"):
            for depth in range(len(steps) + 1):
                least = min(least, limit((root / "sys/fs/cgroup" / mount).joinpath(*steps[:depth])))
    return least


def _limit_2(folder: Path) -> float:
    return _cores(*_read(folder / "cpu.max").split())


def _limit_1(folder: Path) -> float:
    return _cores(_read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip())


def _cores(quota: str = "", period: str = "") -> float:
    """'max', -1 or nothing at all is no limit."""
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() and int(quota) and int(period) else inf


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""


def _listed(file: Path) -> frozenset[int]:
    """The cores of a list such as 0-3,8."""
    found: set[int] = set()
    for part in _read(file).strip().split(","):
        first, _, last = part.partition("-")
        if first.isdecimal() and (last or first).isdecimal():
            found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def _text(numbers: Iterable[int]) -> str:
    """The reverse of _listed."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in spans)
