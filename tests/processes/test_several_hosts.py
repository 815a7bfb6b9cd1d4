"""Two hosts, which are network namespaces with process ids of their own: a wire between them, and on each a second interface with
an address of the same net that cannot be reached from the other. The host's name leads to no address of either."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from launchers_helper import BIN, ROOT, clean, expected, flags, tokens


@dataclass(frozen=True)
class Host:
    name: str
    address: str

    def command(self, *inner: str | Path) -> list[str]:
        """`inner` on this host. Whatever it starts ends with it."""
        alone = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        return ["ip", "netns", "exec", self.name, *alone, *map(str, inner)]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20)


def made(hosts: tuple[Host, Host]) -> None:
    """Raises where it is not allowed."""
    wires = [f"w{host.name}" for host in hosts]
    for host in hosts:
        ip("netns", "add", host.name)
    ip("link", "add", wires[0], "type", "veth", "peer", "name", wires[1])
    for i, (host, wire) in enumerate(zip(hosts, wires, strict=True)):
        ip("link", "set", wire, "netns", host.name)
        inside = ("-n", host.name)
        ip(*inside, "link", "add", "aside", "type", "bridge")  # as docker0 is
        ip(*inside, "addr", "add", f"172.17.0.{i + 1}/16", "dev", "aside")
        ip(*inside, "addr", "add", f"{host.address}/24", "dev", wire)
        for link in ("lo", "aside", wire):
            ip(*inside, "link", "set", link, "up")
    subprocess.run(hosts[0].command("true"), check=True, capture_output=True, text=True, timeout=20)


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    if sys.platform != "linux" or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("needs Linux with iproute2 and unshare")
    mark = f"q{os.getpid() % 10**6}x{int(time.time()) % 1000}"
    pair = (Host(f"{mark}a", "10.99.7.1"), Host(f"{mark}b", "10.99.7.2"))
    try:
        try:
            made(pair)
        except subprocess.CalledProcessError as error:
            if "not permitted" in error.stderr or "Permission denied" in error.stderr:
                pytest.skip(f"network namespaces are not allowed here: {error.stderr.strip()}")
            raise AssertionError(error.stderr) from None
        yield pair
    finally:
        for host in pair:
            subprocess.run(["ip", "netns", "del", host.name], check=False, capture_output=True, timeout=20)


@pytest.fixture(scope="module")
def theirs() -> list[list[int]]:
    return expected()


def start(host: Host, *inner: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        host.command(*inner),
        cwd=ROOT,
        env=clean(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(processes: list[subprocess.Popen[str]], seconds: float = 150) -> list[tuple[int, str, str]]:
    """The exit code, stdout and stderr of each."""
    try:
        told = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [(process.returncode, out, err) for process, (out, err) in zip(processes, told, strict=True)]


def test_the_hosts_are_apart(hosts: tuple[Host, Host]) -> None:
    """The second interfaces lead nowhere, the wire does, and no host sees the other's processes."""
    code = "import socket, sys; socket.create_connection((sys.argv[1], 7), 1)"
    seen = ended([start(hosts[1], sys.executable, "-c", code, there) for there in ("10.99.7.1", "172.17.0.1")])
    assert ["ConnectionRefusedError" in seen[0][2], "ConnectionRefusedError" in seen[1][2]] == [True, False], seen
    identity = "from collectives.network import machine_identity; print(machine_identity())"
    names = {out for code, out, _ in ended([start(host, sys.executable, "-c", identity) for host in hosts]) if code == 0}
    assert len(names) == 2
    assert "" not in names


@pytest.mark.parametrize("communicator", ["gloo", "hierarchical"])
def test_torchrun_on_two_hosts(communicator: str, hosts: tuple[Host, Host], theirs: list[list[int]], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    where = ["--nnodes", "2", "--nproc-per-node", "2", "--master-addr", hosts[0].address, "--master-port", "29417"]
    chosen = ["-m", "qtp.run_pa", *flags(out), "--communicator", communicator]
    runs = ended([start(host, BIN / "torchrun", *where, "--node-rank", str(i), *chosen) for i, host in enumerate(hosts)])
    assert [code for code, _, _ in runs] == [0, 0], runs
    assert tokens(out) == theirs
    assert [text.count("Answer[") for _, text, _ in runs] == [2, 0]


@pytest.mark.parametrize("communicator", ["gloo", "mpi", "hierarchical+mpi"])
def test_mpirun_on_two_hosts(communicator: str, hosts: tuple[Host, Host], theirs: list[list[int]], tmp_path: Path) -> None:
    """Nobody says where to meet: the ranks find the address that all of them reach."""
    out, remote = tmp_path / "out.jsonl", tmp_path / "remote"
    cases = "\n".join(f"{host.address}) name={host.name} ;;" for host in hosts)
    remote.write_text(
        "#!/bin/sh\n"
        'while [ "${1#-}" != "$1" ]; do shift; done\n'
        f'case "$1" in\n{cases}\nesac\nshift\n'
        'exec ip netns exec "$name" unshare --pid --fork --kill-child --mount-proc sh -c "$*"\n'
    )
    remote.chmod(0o755)
    far = ["-launcher", "ssh", "-launcher-exec", str(remote), "-iface", f"w{hosts[0].name}"]
    where = ["-hosts", ",".join(host.address for host in hosts), "-ppn", "2", "-n", "4", *far]
    chosen = [sys.executable, "-m", "qtp.run_pa", *flags(out), "--communicator", communicator]
    ((code, text, told),) = ended([start(hosts[0], BIN / "mpiexec", *where, *chosen)])
    assert code == 0, told
    assert tokens(out) == theirs
    assert text.count("Answer[") == 2
