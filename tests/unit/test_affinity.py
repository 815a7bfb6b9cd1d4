"""Which cores a rank gets, on machines that are told by tables, and what the system is read for."""

import math
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch import affinity
from launch.affinity import MAX_CORES, Allowance, Cores, Topology, allowance, bind, describe, share, topology


def machine(*nodes: range, smt: int = 1, first_siblings: int = 0) -> Topology:
    """Nodes of cores; with smt 2, sibling of core c of node n is c + first_siblings, in the same node."""
    cores = [core for node in nodes for core in node]
    siblings = [frozenset(core + i * first_siblings for i in range(smt)) for core in cores]
    return Topology(
        tuple((n, frozenset(c + i * first_siblings for c in node for i in range(smt))) for n, node in enumerate(nodes)),
        tuple(sorted(siblings, key=min)),
    )


def shares(ranks: int, topology: Topology, cores: object = None, quota: float = math.inf) -> list[tuple[str, int]]:
    """(cores as text, threads) of each of `ranks` ranks that are all allowed `cores`, by default all."""
    allowed = frozenset().union(*(node for _, node in topology.nodes)) if cores is None else frozenset(cores)  # type: ignore[call-overload]
    told = [Allowance(allowed, quota)] * ranks
    found = [share(r, ["a"] * ranks, told, topology) for r in range(ranks)]
    return [(affinity._text(c.cores), c.threads) for c in found]


ONE = machine(range(8))
TWO = machine(range(8), range(8, 16))
FOUR_SMT = machine(range(4), range(4, 8), range(8, 12), range(12, 16), smt=2, first_siblings=16)
HOLES = Topology(
    ((1, frozenset({2, 3, 6, 7})), (4, frozenset({10, 11, 40, 41}))),
    tuple(frozenset({c}) for c in (2, 3, 6, 7, 10, 11, 40, 41)),
)
UNEQUAL = machine(range(6), range(6, 8))


@pytest.mark.parametrize(
    ("topology", "ranks", "expected"),
    [
        (ONE, 1, [("0-7", 8)]),
        (ONE, 2, [("0-3", 4), ("4-7", 4)]),
        (ONE, 3, [("0-1", 2), ("2-3", 2), ("4-5", 2)]),
        (ONE, 8, [(str(c), 1) for c in range(8)]),
        (ONE, 9, [("", 1)] * 9),
        (TWO, 1, [("0-15", 16)]),
        (TWO, 2, [("0-7", 8), ("8-15", 8)]),
        (TWO, 3, [("0-3", 4), ("4-7", 4), ("8-15", 8)]),
        (TWO, 4, [("0-3", 4), ("4-7", 4), ("8-11", 4), ("12-15", 4)]),
        (TWO, 5, [("0-1", 2), ("2-3", 2), ("4-5", 2), ("8-11", 4), ("12-15", 4)]),
        (FOUR_SMT, 1, [("0-31", 16)]),
        (FOUR_SMT, 2, [("0-7,16-23", 8), ("8-15,24-31", 8)]),
        (FOUR_SMT, 3, [("0-3,16-19", 4), ("4-7,20-23", 4), ("8-11,24-27", 4)]),
        (FOUR_SMT, 4, [("0-3,16-19", 4), ("4-7,20-23", 4), ("8-11,24-27", 4), ("12-15,28-31", 4)]),
        (FOUR_SMT, 8, [(f"{c}-{c + 1},{c + 16}-{c + 17}", 2) for c in range(0, 16, 2)]),
        (FOUR_SMT, 16, [(f"{c},{c + 16}", 1) for c in range(16)]),
        (FOUR_SMT, 32, [(str(c + s), 1) for n in range(4) for s in (0, 16) for c in range(4 * n, 4 * n + 4)]),
        (FOUR_SMT, 33, [("", 1)] * 33),
        (HOLES, 2, [("2-3,6-7", 4), ("10-11,40-41", 4)]),
        (HOLES, 4, [("2-3", 2), ("6-7", 2), ("10-11", 2), ("40-41", 2)]),
        (UNEQUAL, 2, [("0-2", 3), ("3-5", 3)]),
        (UNEQUAL, 4, [("0-1", 2), ("2-3", 2), ("4-5", 2), ("6-7", 2)]),
        (machine(range(7), range(7, 8)), 4, [("0-1", 2), ("2-3", 2), ("4-5", 2), ("7", 1)]),
        (machine(range(4), range(4, 8), range(8, 12)), 2, [("0-3", 4), ("4-7", 4)]),
        (machine(range(2), range(2, 4), range(4, 6), range(6, 8), range(8, 10)), 2, [("0-3", 4), ("4-9", 6)]),
    ],
)
def test_ranks_of_one_machine_share_its_cores(topology: Topology, ranks: int, expected: list[tuple[str, int]]) -> None:
    assert shares(ranks, topology) == expected


def test_one_more_rank_than_physical_cores_uses_every_first_sibling_before_a_second() -> None:
    smt = machine(range(4), smt=2, first_siblings=4)
    assert shares(5, smt) == [("0", 1), ("1", 1), ("2", 1), ("3", 1), ("4", 1)]
    assert shares(8, smt) == [(str(c), 1) for c in range(8)]
    neighbours = Topology(((0, frozenset(range(4))),), (frozenset({0, 1}), frozenset({2, 3})))
    assert shares(3, neighbours) == [("0", 1), ("2", 1), ("1", 1)]


def test_a_cpuset_cuts_nodes_and_physical_cores() -> None:
    assert shares(2, TWO, {1, 3, 5, 7, 9, 11}) == [("1,3,5,7", 4), ("9,11", 2)]
    assert shares(3, TWO, {1, 3, 5, 7, 9, 11}) == [("1,3", 2), ("5,7", 2), ("9,11", 2)]
    assert shares(2, FOUR_SMT, {0, 16, 1, 17}) == [("0,16", 1), ("1,17", 1)]
    assert shares(1, FOUR_SMT, {0, 16, 1}) == [("0-1,16", 2)]
    assert shares(2, FOUR_SMT, {16, 17, 4}) == [("16-17", 2), ("4", 1)]
    assert shares(2, ONE, {100, 101}) == [("100", 1), ("101", 1)]  # cores that /sys did not tell


def test_the_quota_bounds_the_threads_of_all_its_ranks() -> None:
    wide = machine(range(64))
    assert shares(2, wide, quota=2.0) == [("0-31", 1), ("32-63", 1)]
    assert shares(2, wide, quota=9.0) == [("0-31", 4), ("32-63", 4)]
    assert shares(2, wide, quota=0.5) == [("0-31", 1), ("32-63", 1)]
    assert shares(1, wide, quota=2.9) == [("0-63", 2)]
    assert shares(2, wide, quota=200.0) == [("0-31", 32), ("32-63", 32)]
    told = [Allowance(frozenset(range(64)), quota) for quota in (8.0, 4.0, math.inf)]
    assert [share(r, ["a"] * 3, told, wide).threads for r in range(3)] == [8, 4, 21]


def test_what_a_launcher_pinned_is_not_divided_again() -> None:
    pinned = [Allowance(frozenset(range(4 * r, 4 * r + 4))) for r in range(4)]
    for rank in range(4):
        assert share(rank, ["a"] * 4, pinned, TWO) == Cores(pinned[rank].cores, 4, (rank // 2,))
    by_pairs = [pinned[0], pinned[0], pinned[2], pinned[2]]
    assert [affinity._text(share(r, ["a"] * 4, by_pairs, TWO).cores) for r in range(4)] == ["0-1", "2-3", "8-9", "10-11"]


@pytest.mark.parametrize(
    ("allowed", "expected"),
    [
        (["0-5", "4-9"], ["0-4", "5-9"]),
        (["0-1", "0-7"], ["0-1", "2-7"]),
        (["0-7", "0-1"], ["2-7", "0-1"]),
        (["0-1", "1-2", "0-2"], ["0", "2", "1"]),
        (["0-3", "0-3", "0-7"], ["0-1", "2-3", "4-7"]),
        (["0", "0", "0-1"], ["", "", "1"]),
    ],
)
def test_sets_that_overlap_in_part_go_first_to_whoever_has_least(tmp_path: Path, allowed: list[str], expected: list[str]) -> None:
    (tmp_path / "list").touch()
    sets = []
    for text in allowed:
        (tmp_path / "list").write_text(text)
        sets.append(Allowance(affinity._listed(tmp_path / "list")))
    found = [share(r, ["a"] * len(sets), sets, machine(range(10))) for r in range(len(sets))]
    assert [affinity._text(cores.cores) for cores in found] == expected
    assert [cores.threads for cores in found] == [max(1, len(cores.cores)) for cores in found]


def test_other_machines_do_not_count() -> None:
    told = [Allowance(frozenset(range(16)), 4.0)] * 3
    assert share(0, ["a", "b", "a"], told, TWO) == Cores(frozenset(range(8)), 2, (0,))
    assert share(1, ["a", "b", "a"], told, TWO) == Cores(frozenset(range(16)), 4, (0, 1))
    assert share(2, [b"a", b"b", b"a"], told, TWO) == Cores(frozenset(range(8, 16)), 2, (1,))


@st.composite
def machines(draw: st.DrawFn) -> tuple[Topology, list[str], list[Allowance]]:
    """Up to 5 nodes of 1 to 9 physical cores in shuffled numbers, up to 4 siblings, and up to 12 ranks on 2 machines."""
    smt = draw(st.integers(1, 4))
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    numbers = iter(draw(st.permutations(range(sum(sizes) * smt))))
    nodes, siblings = [], []
    for n, size in enumerate(sizes):
        units = [frozenset(next(numbers) for _ in range(smt)) for _ in range(size)]
        siblings += units
        nodes.append((n, frozenset().union(*units)))
    everything = sorted(frozenset().union(*siblings))
    sets = draw(st.lists(st.sets(st.sampled_from(everything), min_size=1), min_size=1, max_size=3))
    count = draw(st.integers(1, 12))
    quotas = st.sampled_from([math.inf, 0.5, 2.0, 6.5])
    told = [Allowance(frozenset(draw(st.sampled_from(sets))), draw(quotas)) for _ in range(count)]
    return Topology(tuple(nodes), tuple(siblings)), [draw(st.sampled_from("ab")) for _ in range(count)], told


@given(machines())
def test_shares_are_disjoint_allowed_and_never_empty_of_threads(case: tuple[Topology, list[str], list[Allowance]]) -> None:
    topology, places, told = case
    found = [share(r, places, told, topology) for r in range(len(told))]
    assert found == [share(r, list(places), list(told), topology) for r in range(len(told))]
    for a, cores in enumerate(found):
        assert cores.threads >= 1
        assert cores.cores <= told[a].cores
        if cores.cores:
            touched = {unit for unit in topology.siblings if unit & cores.cores}
            assert cores.threads <= len(touched)
            assert set(cores.nodes) == {n for n, node in topology.nodes if node & cores.cores}
        for b in range(a):
            assert places[a] != places[b] or not cores.cores & found[b].cores


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 2), st.booleans())
def test_all_cores_are_used_where_they_divide_evenly(nodes: int, per_node: int, each: int, smt: int, fewer: bool) -> None:
    """`per_node` ranks a node with `each` physical cores; or, with `fewer`, one rank for `per_node` nodes."""
    count, ranks = (nodes * per_node, nodes) if fewer else (nodes, nodes * per_node)
    size = each if fewer else each * per_node
    machine_ = machine(*(range(n * size, (n + 1) * size) for n in range(count)), smt=smt, first_siblings=1000)
    told = [Allowance(frozenset().union(*machine_.siblings))] * ranks
    found = [share(r, ["a"] * ranks, told, machine_) for r in range(ranks)]
    assert frozenset().union(*(cores.cores for cores in found)) == told[0].cores
    assert {cores.threads for cores in found} == {each * per_node if fewer else each}
    assert {len(cores.nodes) for cores in found} == {per_node if fewer else 1}


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content + "\n")
    return root


NODE, CPU = "sys/devices/system/node", "sys/devices/system/cpu"


def test_the_topology_is_read_from_sys(tmp_path: Path) -> None:
    files = {f"{NODE}/node0/cpulist": "0-1,4-5", f"{NODE}/node10/cpulist": "3,7"}
    files |= {f"{NODE}/node2/cpulist": "2", f"{NODE}/node3/cpulist": ""}
    for first, second in ((0, 4), (1, 5), (2, 2), (3, 7)):
        for core in (first, second):
            files[f"{CPU}/cpu{core}/topology/core_cpus_list"] = f"{first},{second}"
    files[f"{CPU}/cpufreq/x"] = files[f"{CPU}/cpuidle/x"] = files[f"{NODE}/online"] = "0"
    found = topology(tree(tmp_path, files))
    assert found.nodes == ((0, frozenset({0, 1, 4, 5})), (2, frozenset({2})), (10, frozenset({3, 7})))
    assert found.siblings == (frozenset({0, 4}), frozenset({1, 5}), frozenset({2}), frozenset({3, 7}))


def test_older_kernels_tell_siblings_under_another_name(tmp_path: Path) -> None:
    files = {f"{CPU}/cpu{core}/topology/thread_siblings_list": "0-1" for core in (0, 1)}
    assert topology(tree(tmp_path, files)) == Topology(((0, frozenset({0, 1})),), (frozenset({0, 1}),))


def test_without_sys_there_is_one_node(tmp_path: Path) -> None:
    cores = range(os.cpu_count() or 1)
    assert topology(tmp_path) == Topology(((0, frozenset(cores)),), tuple(frozenset({c}) for c in cores))


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, math.inf),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "max 100000"}, math.inf),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "250000 100000"}, 2.5),
        (
            {
                "proc/self/cgroup": "0::/a/b",
                "sys/fs/cgroup/a/b/cpu.max": "800000 100000",
                "sys/fs/cgroup/a/cpu.max": "300000 100000",
            },
            3.0,
        ),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"}, 0.5),
        ({"proc/self/cgroup": "0::/../../outside", "sys/fs/cgroup/cpu.max": "150000 100000"}, 1.5),
        ({"proc/self/cgroup": "0::/a", "sys/fs/cgroup/b/cpu.max": "100000 100000"}, math.inf),
        (
            {
                "proc/self/cgroup": "5:cpuset:/x\n4:cpu,cpuacct:/docker/1\n0::/",
                "sys/fs/cgroup/cpu,cpuacct/docker/1/cpu.cfs_quota_us": "400000",
                "sys/fs/cgroup/cpu,cpuacct/docker/1/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/cpu,cpuacct/docker/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu,cpuacct/docker/cpu.cfs_period_us": "100000",
            },
            4.0,
        ),
        (  # in a container, where the path is that of the host
            {
                "proc/self/cgroup": "1:cpu:/docker/1",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "30000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "20000",
            },
            1.5,
        ),
    ],
)
def test_the_quota_is_the_least_of_the_cgroup_and_those_above(tmp_path: Path, files: dict[str, str], quota: float) -> None:
    found = allowance(tree(tmp_path, files))
    assert found == Allowance(frozenset(os.sched_getaffinity(0)), quota)


@given(st.sets(st.integers(0, MAX_CORES - 1), min_size=1), st.floats(0, exclude_min=True))
def test_an_allowance_survives_its_packing(cores: set[int], quota: float) -> None:
    told = Allowance(frozenset(cores), quota)
    assert len(told.pack()) == Allowance.PACKED
    assert Allowance.unpack(told.pack()) == told


@pytest.mark.parametrize("data", [b"", b"\0" * Allowance.PACKED, b"\1" * (Allowance.PACKED + 1), b"\xff" * Allowance.PACKED])
def test_what_is_no_allowance_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="allowance"):
        Allowance.unpack(data)


def test_binding_holds_for_later_threads_and_is_undone() -> None:
    before = os.sched_getaffinity(0)
    core = max(before)
    started, done = threading.Event(), threading.Event()
    seen: list[set[int]] = []

    def look() -> None:
        seen.append(os.sched_getaffinity(0))
        started.set()
        done.wait(10)
        seen.append(os.sched_getaffinity(0))

    restore = bind(Cores(frozenset({core}), 1))
    try:
        assert os.sched_getaffinity(0) == {core}
        thread = threading.Thread(target=look)
        thread.start()
        assert started.wait(10)
    finally:
        restore()
    done.set()
    thread.join()
    assert os.sched_getaffinity(0) == before
    assert seen == [{core}, before]


def test_binding_to_none_or_to_what_is_not_there() -> None:
    before = os.sched_getaffinity(0)
    bind(Cores(frozenset(), 3))()
    with pytest.raises(ValueError, match=r"cores 4000 cannot be bound .*use --bind-cpu 0"):
        bind(Cores(frozenset({4000}), 1))
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize(
    ("cores", "text"),
    [
        (Cores(frozenset({0, 1}), 2, (0,)), "2 threads on cores 0-1 (NUMA node 0)"),
        (Cores(frozenset({5}), 1), "1 thread on core 5"),
        (Cores(frozenset({0, 1, 8, 10, 11}), 2, (0, 1)), "2 threads on cores 0-1,8,10-11 (NUMA nodes 0-1)"),
        (Cores(frozenset(), 1), "1 thread, not pinned"),
    ],
)
def test_the_choice_is_told_in_words(cores: Cores, text: str) -> None:
    assert describe(cores) == text


def test_threads_per_rank_respects_cores_and_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(affinity, "topology", lambda: TWO)
    monkeypatch.setattr(affinity, "allowance", lambda: Allowance(frozenset(range(16))))
    assert [affinity.threads_per_rank(n) for n in (1, 2, 5, 16, 17)] == [16, 8, 4, 1, 1]
    monkeypatch.setattr(affinity, "allowance", lambda: Allowance(frozenset(range(16)), 6.0))
    assert [affinity.threads_per_rank(n) for n in (1, 2, 5)] == [6, 3, 1]
