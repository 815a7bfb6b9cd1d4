"""The Ray launcher: who gets which rank, device and variables; how ranks end, and that nothing of a run is left. On a cluster of
two nodes on this host, with devices that exist only in Ray's books, and on clusters of a run's own."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from ray_ranks import meet

from launch import ray_cluster
from launch.watch import RankDied, run_while

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RAY = Path(sys.executable).parent / "ray"
CPU = {"CPU": 1.0}
DIES_WITH_PARENT = "from launch.local import die_with_parent; die_with_parent(); import time; time.sleep(600)"


def until(holds: Callable[[], object], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def gone(pids: list[int]) -> bool:
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)


def family(pid: int) -> list[int]:
    return [process.pid for process in psutil.Process(pid).children(recursive=True)]


@pytest.fixture(scope="module", autouse=True)
def token() -> Iterator[None]:
    """Clusters of these tests let in who knows this token, and leave the user's one alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        yield


@pytest.fixture(scope="module")
def cluster(token: None) -> Iterator[str]:
    """The address of a cluster of two nodes with 2 CPUs each; the first, with the head, also has 4 GPUs and 2 NPUs."""
    folder = tempfile.mkdtemp(prefix="qtp-test-", dir="/tmp")
    common = ["--block", "--object-store-memory=80000000", "--disable-usage-stats", f"--temp-dir={folder}"]
    head = ["--head", "--port=0", "--include-dashboard=false", "--node-ip-address=127.0.0.2", "--num-cpus=2", "--num-gpus=4"]
    nodes = []

    def start(*argv: str) -> None:
        with (Path(folder) / f"node{len(nodes)}").open("wb") as log:
            command = [RAY, "start", *argv, *common]
            nodes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/"))

    def said(node: int, what: str) -> bool:
        text = (Path(folder) / f"node{node}").read_text()
        assert nodes[node].poll() is None, text
        return what in text

    pids: list[int] = []
    try:
        start(*head, '--resources={"NPU": 2}')
        assert until(lambda: said(0, "Ray runtime started"), 60)
        address = (Path(folder) / "ray_current_cluster").read_text()
        start(f"--address={address}", "--node-ip-address=127.0.0.3", "--num-cpus=2")
        assert until(lambda: said(1, "Ray runtime started"), 60)
        yield address
    finally:
        for node in nodes:
            pids += [node.pid, *family(node.pid)]
            node.terminate()
        until(lambda: gone(pids), 5)
        for pid in pids:
            if not gone([pid]):
                os.kill(pid, signal.SIGKILL)
        for node in nodes:
            node.wait(10)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def connected(cluster: str) -> Iterator[object]:
    """This process, connected to the cluster by itself; that connection survives all runs."""
    import ray

    ray.init(address=cluster, logging_level="ERROR", log_to_driver=False)
    yield ray
    assert ray.is_initialized()
    ray.shutdown()


def sleeping(code: str = "import time; time.sleep(600)") -> list[str]:
    return [sys.executable, "-c", code]


def free(ray: object) -> dict[str, float]:
    found = ray.available_resources()  # type: ignore[attr-defined]
    return {name: found.get(name, 0) for name in ("CPU", "GPU", "NPU", "node:127.0.0.2")}


ALL = {"CPU": 4.0, "GPU": 4.0, "NPU": 2.0, "node:127.0.0.2": 1.0}


def test_ranks_meet_on_two_nodes_and_are_numbered_within_theirs(connected: object, tmp_path: Path) -> None:
    argv = [sys.executable, str(HERE / "ray_ranks.py"), "meet", str(tmp_path)]
    before = signal.getsignal(signal.SIGTERM)
    rendezvous, ranks = ray_cluster.start(4, argv, 60.0, address=None, resources={"CPU": 1.0})
    assert (rendezvous.rank, rendezvous.size, rendezvous.local_rank, rendezvous.local_size) == (0, 4, 0, 2)
    assert rendezvous.address == "127.0.0.2"
    assert len(rendezvous.token) == 32
    try:
        ranks.check()
        run_while(lambda: meet(rendezvous, tmp_path), lambda: None)
        told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
        assert [t["sums"] for t in told] == [[1111.0, 6.0]] * 4
        assert [t["local"] for t in told] == [[0, 2], [1, 2], [0, 2], [1, 2]]
        assert {t["address"] for t in told} == {"127.0.0.2"}
        assert {t["folder"] for t in told} == {str(Path.cwd())}
        deaths = [ranks.death(rank, 40.0) for rank in (1, 2, 3)]
        assert [death.cause for death in deaths if death is not None] == ["ended with exit code 7"] * 3
    finally:  # or the cluster is full for all that comes
        ranks.stop(0.0)
    assert until(lambda: free(connected) == ALL, 10), free(connected)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("kind", "variable"), [("GPU", "cuda"), ("NPU", "npu")])
def test_each_rank_sees_the_devices_of_its_node_by_local_rank(
    connected: object, tmp_path: Path, kind: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # set where the tests hide a card
    argv = [sys.executable, str(HERE / "ray_ranks.py"), "meet", str(tmp_path)]
    rendezvous, ranks = ray_cluster.start(2, argv, 60.0, address=None, resources={"CPU": 1.0, kind: 1.0})
    try:
        assert free(connected)[kind] == ALL[kind] - 2
        run_while(lambda: meet(rendezvous, tmp_path), ranks.check)
        told = json.loads((tmp_path / "1.json").read_text())
        assert told["local"] == [1, 2]
        assert told["sums"] == [11.0, 3.0]
        assert told[variable] == "0,1"
    finally:
        ranks.stop(5.0)


def test_a_killed_rank_is_named_and_the_others_are_ended(connected: object, capfd: pytest.CaptureFixture[str]) -> None:
    import ray

    code = "import os, signal; print(os.getpid(), flush=True); signal.signal(15, signal.SIG_IGN)\nwhile True: signal.pause()"
    _, ranks = ray_cluster.start(3, sleeping(code), 60.0, address="auto", resources=CPU)
    err: list[str] = []

    def both() -> bool:
        out, more = capfd.readouterr()
        assert out == "", "nothing of theirs on our standard output"
        err.extend(more.splitlines())
        return len(err) == 2

    assert until(both, 20), err
    pids = {int(line) for line in err}
    ranks.check()
    assert ranks.death(1) is None
    groups = ray.util.placement_group_table()
    assert [group["state"] for group in groups.values()].count("CREATED") == 1
    actors = [pid for pid in (psutil.Process(pid).ppid() for pid in pids) if "Keeper" in " ".join(psutil.Process(pid).cmdline())]
    assert len(actors) == 2
    victim = min(pids)
    os.kill(victim, signal.SIGKILL)
    deaths = [ranks.death(rank, 5.0 if rank == 1 else 1.0) for rank in (1, 2)]
    (death,) = [death for death in deaths if death is not None]
    with pytest.raises(RankDied, match=rf"^rank {death.rank} \(host {os.uname().nodename}, pid {victim}\): ended with signal 9$"):
        ranks.check()
    before = time.monotonic()
    ranks.stop(0.5)
    assert time.monotonic() - before < 5
    assert gone(list(pids))
    assert until(lambda: gone(actors), 5)
    assert until(lambda: free(connected) == ALL, 10), free(connected)
    assert [group["state"] for group in ray.util.placement_group_table().values()].count("CREATED") == 0


def test_kill_ends_a_stopped_rank_and_an_actor_that_is_gone_is_told(connected: object, capfd: pytest.CaptureFixture[str]) -> None:
    code = "import os; print(os.getpid(), flush=True); " + DIES_WITH_PARENT
    _, ranks = ray_cluster.start(3, sleeping(code), 60.0, address=None, resources=CPU)
    try:
        err: list[str] = []
        assert until(lambda: err.extend(capfd.readouterr().err.split()) or len(err) == 2, 20)
        pids = [int(line) for line in err]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        ranks.kill(2)
        death = ranks.death(2, 5.0)
        assert death is not None
        assert death.cause == "ended with signal 9"
        (other,) = [pid for pid in pids if pid != death.pid]
        os.kill(other, signal.SIGCONT)
        os.kill(psutil.Process(other).ppid(), signal.SIGKILL)
        death = ranks.death(1, 10.0)
        assert death is not None
        assert death.pid == other
        assert death.cause.startswith("its Ray actor is gone (")
        assert until(lambda: gone([other]), 5), "the child ends with its actor"
    finally:
        ranks.stop(0.0)


@pytest.mark.parametrize(
    ("size", "resources", "says"),
    [
        (7, CPU, "7 ranks with CPU 1 each do not fit into the Ray cluster, which has CPU 4, of these free CPU 4; start fewer"),
        (3, {"CPU": 1.0, "NPU": 1.0}, "3 ranks with CPU 1, NPU 1 each do not fit into the Ray cluster, which has CPU 4, NPU 2"),
        (2, {"CPU": 9.0}, "rank 0 is this process and needs CPU 9, and its node (127.0.0.2) has CPU 2; run this command on a"),
        (2, {"GPU": 0.5}, "GPU 0.5 for a rank: a rank works on one whole device; ask for GPU 1"),
    ],
)
def test_what_does_not_fit_is_one_line(connected: object, size: int, resources: dict[str, float], says: str) -> None:
    before = time.monotonic()
    with pytest.raises(ValueError) as caught:
        ray_cluster.start(size, sleeping(), 2.0, address=None, resources=resources)
    assert str(caught.value).startswith(says), str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - before < 10
    assert until(lambda: free(connected) == ALL, 10)


def test_a_program_that_is_not_there_is_one_line(connected: object) -> None:
    with pytest.raises(
        ValueError, match=r"^rank 1 cannot be started on host .* \(No such file or directory: /no/python\); every "
    ):
        ray_cluster.start(2, ["/no/python"], 30.0, address=None, resources=CPU)
    assert until(lambda: free(connected) == ALL, 10)


def test_another_address_than_that_of_the_connection_is_refused(connected: object, cluster: str) -> None:
    with pytest.raises(ValueError, match=rf"^ray_address '10.0.0.1:6379': this process is already connected .* at {cluster}; "):
        ray_cluster.start(2, sleeping(), 2.0, address="10.0.0.1:6379", resources=CPU)


def test_without_ray_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        ValueError, match=r"^launcher 'ray' needs Ray \(.*\); pip install 'qtp\[ray\]', or choose --launcher local$"
    ):
        ray_cluster.start(2, sleeping(), 2.0, address=None, resources=CPU)


class Driver:
    """`ray_ranks.py drive` in a session of its own."""

    def __init__(self, address: str | None, folder: Path, code: str = DIES_WITH_PARENT) -> None:
        self.folder = folder
        self.err = folder / "err"
        (folder / "tmp").mkdir()
        with self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "ray_ranks.py"), "drive", address or "none", str(folder), code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=err,
                start_new_session=True,
                cwd=ROOT,
            )

    def reaches(self, what: str) -> object:
        done = until(lambda: (self.folder / what).exists() or self.process.poll() is not None, 60)
        assert done, self.err.read_text()
        assert (self.folder / what).exists(), self.err.read_text()
        assert until(lambda: (self.folder / what).read_text(), 5)
        return json.loads((self.folder / what).read_text())

    def say(self, line: bytes = b"\n") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line)
        self.process.stdin.flush()

    def end(self) -> tuple[str, str]:
        out, _ = self.process.communicate(timeout=30)
        return out.decode(), self.err.read_text()


PRINTS = "import os, sys, time; print('out', os.environ['RANK']); print('err', os.environ['RANK'], file=sys.stderr); sys.exit(5)"


def ray_folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("qtp-ray-*")) | set(Path("/tmp").glob("qtp-ray-*"))


def test_a_cluster_of_its_own_ends_with_the_run_and_output_is_passed_on(tmp_path: Path) -> None:
    before = ray_folders()
    driver = Driver(None, tmp_path, PRINTS)
    driver.reaches("started")
    pids = family(driver.process.pid)
    assert any("raylet" in " ".join(psutil.Process(pid).cmdline()) for pid in pids)
    assert len(ray_folders() - before) == 1
    assert until(lambda: len(driver.err.read_text().splitlines()) == 4, 20), driver.err.read_text()
    time.sleep(0.2)
    driver.say()
    ends = driver.reaches("stopped")
    assert [end.split(": ")[1] for end in ends] == ["ended with exit code 5"] * 2  # type: ignore[attr-defined]
    assert until(lambda: gone(pids), 5), [psutil.Process(p) for p in pids if not gone([p])]
    assert ray_folders() - before == set()
    out, err = driver.end()
    assert (driver.process.returncode, out) == (0, "")
    assert sorted(err.splitlines()) == ["err 1", "err 2", "out 1", "out 2"], "whole lines, no prefix, nothing else"


def test_when_rank_0_is_killed_all_end_and_nothing_is_left(tmp_path: Path) -> None:
    before = ray_folders()
    driver = Driver(None, tmp_path)
    assert driver.reaches("started") == ["None", "None"]
    pids = family(driver.process.pid)
    assert sum("die_with_parent" in " ".join(psutil.Process(pid).cmdline()) for pid in pids) == 2
    driver.process.kill()
    driver.end()
    assert until(lambda: gone(pids), 8), [psutil.Process(p) for p in pids if not gone([p])]
    assert until(lambda: ray_folders() - before == set(), 5)


def test_when_rank_0_on_a_running_cluster_is_killed_its_ranks_end_and_the_cluster_goes_on(
    connected: object, cluster: str, tmp_path: Path
) -> None:
    driver = Driver(
        cluster,
        tmp_path,
        f"import os; open('{tmp_path}/' + os.environ['RANK'], 'w').write(str(os.getpid())); " + DIES_WITH_PARENT,
    )
    assert driver.reaches("started") == ["None", "None"]
    pids = [int(str(driver.reaches(rank))) for rank in ("1", "2")]
    assert free(connected)["CPU"] == 1.0
    driver.process.kill()
    driver.end()
    assert until(lambda: gone(pids), 8)
    assert until(lambda: free(connected) == ALL, 10), free(connected)


def test_run_pa_gives_the_tokens_of_one_rank(cluster: str, tmp_path: Path) -> None:
    flags = ["--model", "qtp/demo/dense", "--dtype", "float32", "--load_tokenizer", "False", "--input_ids", "5,6,7", "9,8"]
    flags += ["--max_output_length", "24", "--ignore_eos"]
    tokens = []
    for name, more in (("one", ["--tp", "1"]), ("two", ["--tp", "2", "--launcher", "ray", "--ray_address", cluster])):
        out = tmp_path / f"{name}.jsonl"
        command = [sys.executable, "-m", "qtp.run_pa", *flags, *more, "--output", str(out)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 0, done.stderr
        tokens.append([json.loads(line)["token_ids"] for line in out.read_text().splitlines()])
    assert tokens[0] == tokens[1]
    assert [len(ids) for ids in tokens[0]] == [24, 24]


@pytest.mark.parametrize(
    ("address", "says"),
    [
        (
            "127.0.0.1:9",
            r"^no Ray cluster answers at 127\.0\.0\.1:9 \(Connection refused\); start one with `ray start --head`, or",
        ),
        (
            "ray://127.0.0.1:10001",
            r"^ray_address 'ray://127\.0\.0\.1:10001': rank 0 must be on a node of the cluster; run there, w",
        ),
        ("somewhere", r"^ray_address 'somewhere' must be HOST:PORT of a Ray cluster's head, or auto$"),
        ("host:70000", r"^ray_address 'host:70000' must be HOST:PORT of a Ray cluster's head, or auto$"),
    ],
)
def test_an_address_where_no_cluster_is_gives_one_line(monkeypatch: pytest.MonkeyPatch, address: str, says: str) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ValueError, match=says):
        ray_cluster.start(2, sleeping(), 2.0, address=address, resources=CPU)
