"""What each launcher says in the environment, as tables: who this rank is, where the ranks meet, and what is refused."""

import re
from collections.abc import Mapping

import pytest

from collectives.rendezvous import Rendezvous
from launch.detect import detect

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "2",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "3", "PMI_FD": "9"}
SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_NTASKS": "9",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_TASKS_PER_NODE": "4(x2),1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_STEP_NODELIST": "n[01-03,7]",
    "SLURM_JOB_NODELIST": "n[00-03,7]",
}
SBATCH = {k: SRUN[k] for k in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_TASKS_PER_NODE", "SLURM_JOB_NODELIST")}
SBATCH |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
THERE = {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "1234"}


def without(environ: Mapping[str, str], *names: str, **more: str) -> dict[str, str]:
    return {**{k: v for k, v in environ.items() if k not in names}, **more}


def found(environ: Mapping[str, str]) -> tuple[int, int, int, int, str, int]:
    r = detect(environ=environ)
    return r.rank, r.size, r.local_rank, r.local_size, r.address, r.port


SRUN_PORT = 20011 + (101 * 4711) % 12007
LONE = (0, 1, 0, 1, "127.0.0.1", 0)

WHAT_IS_FOUND: dict[str, tuple[dict[str, str], tuple[int, int, int, int, str, int]]] = {
    "nothing": ({}, LONE),
    "torchrun": (TORCHRUN, (3, 4, 1, 2, "n1", 29500)),
    "torchrun, a lone process": ({"RANK": "0", "WORLD_SIZE": "1"}, LONE),
    "torchrun inside a step of srun": ({**SRUN, **TORCHRUN}, (3, 4, 1, 2, "n1", 29500)),
    "torchrun inside mpirun": ({**MPICH, **OPEN_MPI, **TORCHRUN}, (3, 4, 1, 2, "n1", 29500)),
    "Open MPI": (OPEN_MPI, (2, 4, 0, 2, "127.0.0.1", 0)),
    "Open MPI, all on one host": (without(OPEN_MPI, OMPI_COMM_WORLD_LOCAL_SIZE="4"), (2, 4, 0, 4, "127.0.0.1", 0)),
    "Open MPI, told where": ({**OPEN_MPI, **THERE}, (2, 4, 0, 2, "10.0.0.7", 1234)),
    "Open MPI, told the address alone": ({**OPEN_MPI, "MASTER_ADDR": "10.0.0.7"}, (2, 4, 0, 2, "10.0.0.7", 0)),
    "Open MPI in an allocation of Slurm": ({**SRUN, **OPEN_MPI}, (2, 4, 0, 2, "127.0.0.1", 0)),
    "Open MPI, one rank": (
        dict(zip(OPEN_MPI, ("0", "1", "0", "1"), strict=True)),
        LONE,
    ),
    "MPICH": (MPICH, (2, 4, 1, 3, "127.0.0.1", 0)),
    "MPICH, told where": ({**MPICH, **THERE}, (2, 4, 1, 3, "10.0.0.7", 1234)),
    "MPICH, told the port alone, on one host": (
        without(MPICH, MPI_LOCALNRANKS="4", MASTER_PORT="77"),
        (2, 4, 1, 4, "127.0.0.1", 77),
    ),
    "MPICH in an allocation of Slurm": ({**SRUN, **MPICH}, (2, 4, 1, 3, "127.0.0.1", 0)),
    "srun": (SRUN, (5, 7, 1, 2, "n01", SRUN_PORT)),
    "srun, the last node": (without(SRUN, SLURM_PROCID="6", SLURM_NODEID="3", SLURM_LOCALID="0"), (6, 7, 0, 1, "n01", SRUN_PORT)),
    "srun, ranks dealt out in turn": (without(SRUN, SLURM_PROCID="4", SLURM_NODEID="0"), (4, 7, 1, 2, "n01", SRUN_PORT)),
    "srun with PMI": ({**SRUN, "PMI_RANK": "5", "PMI_SIZE": "7"}, (5, 7, 1, 2, "n01", SRUN_PORT)),
    "srun, the step's id in its old name": (without(SRUN, "SLURM_STEP_ID", SLURM_STEPID="3"), (5, 7, 1, 2, "n01", SRUN_PORT + 3)),
    "srun, names of the job alone": (
        without(SRUN, "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST", SLURM_NODEID="1"),
        (5, 9, 1, 4, "n00", SRUN_PORT),
    ),
    "srun, told where": ({**SRUN, **THERE}, (5, 7, 1, 2, "10.0.0.7", 1234)),
    "srun, told the port": ({**SRUN, "MASTER_PORT": "1234"}, (5, 7, 1, 2, "n01", 1234)),
    "srun, on one node": (
        without(SRUN, SLURM_STEP_TASKS_PER_NODE="7", SLURM_NODEID="0", SLURM_LOCALID="5", SLURM_STEP_NODELIST="n01"),
        (5, 7, 5, 7, "127.0.0.1", SRUN_PORT),
    ),
    "srun, one task": (without(SRUN, SLURM_STEP_NUM_TASKS="1", SLURM_PROCID="0", SLURM_LOCALID="0"), LONE),
    "the script that sbatch runs": (SBATCH, LONE),
    "the shell of salloc": ({**SBATCH, "SLURM_STEP_ID": str(0xFFFFFFFA)}, LONE),
    "a batch step": ({**SBATCH, "SLURM_STEP_ID": str(0xFFFFFFFB)}, LONE),
}


@pytest.mark.parametrize("name", WHAT_IS_FOUND)
def test_found(name: str) -> None:
    environ, expected = WHAT_IS_FOUND[name]
    assert found(environ) == expected
    assert detect(12.5, environ).timeout == 12.5
    assert (detect(environ=environ).token, detect(environ={**environ, "QTP_TOKEN": "s3"}).token) == ("", "s3")


def test_torchrun_serves_the_store_and_counts_restarts() -> None:
    r = detect(environ=TORCHRUN)
    assert (r.served, r.attempt, r.listener) == (True, 2, None)
    r = detect(environ=without(TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"))
    assert (r.served, r.attempt) == (False, 0)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu5", "gpu5"),
        ("gpu5,n[01-03]", "gpu5"),
        ("n[01-03,7],gpu5", "n01"),
        ("n[7,01-03]", "n7"),
        ("n[007]", "n007"),
        ("rack[2-3]n[10-12]-ib,x", "rack2n10-ib"),
        ("a.b-c.example,d", "a.b-c.example"),
    ],
)
def test_the_first_of_a_list_of_nodes(nodes: str, first: str) -> None:
    assert detect(environ={**SRUN, "SLURM_STEP_NODELIST": nodes}).address == first


def test_ranks_of_an_uneven_step_add_up() -> None:
    """Every task of a step of 2, 2, 2 and 1, in blocks and dealt out in turn, sees its own node's number of tasks."""
    for order in ([0, 0, 1, 1, 2, 2, 3], [0, 1, 2, 3, 0, 1, 2]):
        told: dict[int, list[Rendezvous]] = {}
        for rank, node in enumerate(order):
            more = {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(node), "SLURM_LOCALID": str(order[:rank].count(node))}
            told.setdefault(node, []).append(detect(environ={**SRUN, **more}))
        assert [len(there) for there in told.values()] == [2, 2, 2, 1]
        for there in told.values():
            assert [r.local_rank for r in there] == list(range(len(there)))
            assert {r.local_size for r in there} == {len(there)}
            assert {(r.address, r.port) for r in there} == {("n01", SRUN_PORT)}


def test_steps_and_jobs_of_one_host_get_ports_of_their_own() -> None:
    """Below those that systems choose by themselves, which start at 32768 or above."""
    ports = [
        detect(environ={**SRUN, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}).port
        for job in range(90001, 90101)
        for step in range(100)
    ]
    assert min(ports) >= 20011
    assert max(ports) < 32768
    assert len(set(ports)) == len(ports)


REFUSED: dict[str, tuple[dict[str, str], str]] = {
    "no WORLD_SIZE": (without(TORCHRUN, "WORLD_SIZE"), "WORLD_SIZE is missing"),
    "no RANK": (without(TORCHRUN, "RANK"), "RANK is missing"),
    "no LOCAL_RANK": (without(TORCHRUN, "LOCAL_RANK"), "LOCAL_RANK is missing"),
    "no MASTER_PORT": (without(TORCHRUN, "MASTER_PORT"), "MASTER_PORT is missing"),
    "a word": (without(TORCHRUN, RANK="one"), "RANK is 'one', not a number"),
    "nothing": (without(TORCHRUN, RANK=""), "RANK is '', not a number"),
    "a rank too high": (
        without(TORCHRUN, RANK="4"),
        "RANK 4, WORLD_SIZE 4, LOCAL_RANK 1, LOCAL_WORLD_SIZE 2 make no sense together",
    ),
    "no ranks": (without(TORCHRUN, WORLD_SIZE="0"), "WORLD_SIZE 0"),
    "no port": (without(TORCHRUN, MASTER_PORT="65536"), "MASTER_PORT is '65536', not a port from 1 to 65535"),
    "port 0": (without(TORCHRUN, MASTER_PORT="0"), "MASTER_PORT is '0', not a port"),
    "Open MPI, no local size": (without(OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE"), "OMPI_COMM_WORLD_LOCAL_SIZE is missing"),
    "Open MPI, no size": (without(OPEN_MPI, "OMPI_COMM_WORLD_SIZE"), "OMPI_COMM_WORLD_SIZE is missing"),
    "Open MPI, a negative rank": (
        without(OPEN_MPI, OMPI_COMM_WORLD_RANK="-1"),
        "OMPI_COMM_WORLD_RANK -1, OMPI_COMM_WORLD_SIZE 4",
    ),
    "Open MPI, a port for several hosts": ({**OPEN_MPI, "MASTER_PORT": "9"}, "MASTER_PORT is set and MASTER_ADDR is not"),
    "MPICH, no rank": (without(MPICH, "PMI_RANK"), "PMI_RANK is missing"),
    "MPICH, no local rank": (without(MPICH, "MPI_LOCALRANKID"), "MPI_LOCALRANKID is missing"),
    "MPICH, more here than in all": (without(MPICH, MPI_LOCALNRANKS="5"), "PMI_SIZE 4, MPI_LOCALRANKID 1, MPI_LOCALNRANKS 5"),
    "MPICH, a word": (without(MPICH, PMI_SIZE="4x"), "PMI_SIZE is '4x', not a number"),
    "MPICH, a wrong port": ({**MPICH, "MASTER_PORT": "http"}, "MASTER_PORT is 'http', not a number"),
    "srun, no local rank": (without(SRUN, "SLURM_LOCALID"), "SLURM_LOCALID is missing"),
    "srun, no number of tasks": (without(SRUN, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), "SLURM_NTASKS is missing"),
    "srun, no node": (without(SRUN, "SLURM_NODEID"), "SLURM_NODEID is missing"),
    "srun, no tasks by node": (
        without(SRUN, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"),
        "SLURM_TASKS_PER_NODE is missing",
    ),
    "srun, tasks by node that do not add up": (
        without(SRUN, SLURM_STEP_TASKS_PER_NODE="2(x3)"),
        "SLURM_STEP_TASKS_PER_NODE is '2(x3)', not the tasks of each node, 7 in all",
    ),
    "srun, nonsense by node": (without(SRUN, SLURM_STEP_TASKS_PER_NODE="2(x3,1"), "SLURM_STEP_TASKS_PER_NODE is '2(x3,1'"),
    "srun, a repetition without end": (
        without(SRUN, SLURM_STEP_TASKS_PER_NODE="0(x99999999999999999999)"),
        "SLURM_STEP_TASKS_PER_NODE is '0(x",
    ),
    "srun, a node too high": (without(SRUN, SLURM_NODEID="4"), "SLURM_NODEID is '4', not one of the 4 nodes"),
    "srun, a negative node": (without(SRUN, SLURM_NODEID="-1"), "SLURM_NODEID is '-1', not one of the 4 nodes"),
    "srun, a local rank too high": (without(SRUN, SLURM_LOCALID="2"), "SLURM_LOCALID 2, SLURM_STEP_TASKS_PER_NODE 2 make no"),
    "srun, no list of nodes": (without(SRUN, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"), "SLURM_JOB_NODELIST is missing"),
    "srun, an open bracket": (without(SRUN, SLURM_STEP_NODELIST="n[01-"), "SLURM_STEP_NODELIST is 'n[01-', not a list of nodes"),
    "srun, empty brackets": (without(SRUN, SLURM_STEP_NODELIST="n[],m"), "SLURM_STEP_NODELIST is 'n[],m', not a list of nodes"),
    "srun, no job": (without(SRUN, "SLURM_JOB_ID"), "SLURM_JOB_ID is missing"),
    "srun, a step in words": (without(SRUN, SLURM_STEP_ID="batch"), "SLURM_STEP_ID is 'batch', not a number"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    environ, words = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        detect(environ=environ)
    assert "\n" not in str(caught.value)


def attempt(environ: dict[str, str]) -> tuple[Rendezvous | None, str]:
    try:
        return detect(environ=environ), ""
    except ValueError as error:
        return None, str(error)


LAUNCHERS = {"torchrun": TORCHRUN, "ompi": OPEN_MPI, "mpich": MPICH, "srun": SRUN, "sbatch": SBATCH}
JUNK = ("", " ", "-", "-3", "1e3", "NaN", "0x10", "99999999999999999999", "[", "](", "\0", "½", "a,b", "2(x)")


@pytest.mark.parametrize("environ", LAUNCHERS.values(), ids=LAUNCHERS)
@pytest.mark.parametrize("junk", JUNK)
def test_any_variable_may_hold_nonsense(environ: dict[str, str], junk: str) -> None:
    """It is refused in one line that names a variable, or the ranks it gives make sense. Never anything else."""
    for name in environ:
        r, told = attempt({**environ, name: junk})
        if r is None:
            assert "\n" not in told
            assert any(variable in told for variable in environ)
        else:
            assert 0 <= r.rank < r.size
            assert 0 <= r.local_rank < r.local_size <= r.size
            assert 0 <= r.port < 65536


def test_it_reads_what_it_is_given_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert found({}) == LONE
    assert detect().rank == 3
