"""The laws of the house that a reader of the source can check: who imports what, who reads the environment, what never occurs."""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(f for room in ("collectives", "launch", "qtp") for f in (ROOT / room).rglob("*.py"))
NAMES = [f.relative_to(ROOT).as_posix() for f in FILES]
SCRIPTS = sorted((ROOT / "scripts").rglob("*.py"))
READS_ENVIRONMENT = {"launch/detect.py", "launch/local.py", "launch/ray_keeper.py"}
each_file = pytest.mark.parametrize("file", FILES, ids=NAMES)
each_file_and_script = pytest.mark.parametrize(
    "file", FILES + SCRIPTS, ids=[*NAMES, *(f.relative_to(ROOT).as_posix() for f in SCRIPTS)]
)

UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "multiprocessing", "xmlrpc"}
UNPICKLERS_BELOW = ("torch.multiprocessing", "torch.package", "mpi4py.futures", "mpi4py.util")
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec", "os.system", "os.popen"}
FORBIDDEN_LOADS = {"torch.load", "torch.jit.load", "torch.hub.load"}
OBJECT_COLLECTIVES = {
    *("broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list", "send_object_list"),
    *("recv_object_list", "_object_to_tensor", "_tensor_to_object", "send_pyobj", "recv_pyobj"),
}
MPI_OBJECTS = {
    *("send", "bsend", "ssend", "isend", "ibsend", "issend", "recv", "irecv", "sendrecv", "mrecv", "bcast", "gather", "scatter"),
    *("allgather", "alltoall", "reduce", "allreduce", "scan", "exscan", "ibcast", "mprobe", "improbe", "py2mpi"),
    *("publish_name_object", "isendrecv", "neighbor_allgather", "neighbor_alltoall"),
}
ANYWHERE = {"", "0.0.0.0", "::", "0", "*", "0:0:0:0:0:0:0:0"}
STARTS = {
    *("subprocess.Popen", "subprocess.run", "subprocess.call", "subprocess.check_call", "subprocess.check_output", "Popen"),
    *("asyncio.create_subprocess_exec", "asyncio.create_subprocess_shell", "pty.spawn", "runpy.run_module"),
}
OS_STARTS = re.compile(r"os\.(exec|spawn|posix_spawn)\w*$")
SECRET = re.compile(r"(^|_)(token|secret)$", re.IGNORECASE)
GROWS = ("append", "extend", "insert")
NO_SECRETS = ("qtp/engine/", "qtp/tokenizer.py", "qtp/layers/", "qtp/models/", "scripts/train_demo.py")  # tokens of text


def imported(tree: ast.AST) -> Iterator[str]:
    """Full names of all that is imported anywhere in a file, inside functions as well."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def dotted(node: ast.AST) -> str:
    """a.b.c for an attribute chain, else what there is of it."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def used(tree: ast.AST) -> set[str]:
    return {dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute | ast.Name)}


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def test_there_is_something_to_check() -> None:
    assert {"collectives/torch_group.py", "launch/detect.py", "qtp/config.py", "qtp/layout/split.py"} <= set(NAMES)


@each_file
def test_torch_distributed_has_one_home(file: Path) -> None:
    tree = parse(file)
    found = {n for n in imported(tree) if within(n, "torch.distributed")} | {
        n for n in used(tree) if within(n, "torch.distributed")
    }
    assert not found or file == ROOT / "collectives" / "torch_group.py", found


@each_file
def test_the_environment_is_read_in_few_places(file: Path) -> None:
    tree = parse(file)
    ways = ("os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv", "os.unsetenv")
    found = {n for n in (*imported(tree), *used(tree)) if any(within(n, way) for way in ways)}
    assert not found or file.relative_to(ROOT).as_posix() in READS_ENVIRONMENT, found


def unpickling(tree: ast.AST) -> list[str]:
    """What unpickles, or evaluates what it is given."""
    names = list(imported(tree))
    found = [n for n in names if n.split(".")[0] in UNPICKLERS or any(within(n, module) for module in UNPICKLERS_BELOW)]
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    found += [name for call in calls if (name := dotted(call.func)) in FORBIDDEN_CALLS]
    found += sorted(FORBIDDEN_LOADS & (used(tree) | set(names)))
    found += [n for n in sorted(used(tree)) if n.endswith("MPI.pickle")]
    for keyword in (k for call in calls for k in call.keywords):
        if keyword.arg in ("shell", "allow_pickle", "trust_remote_code") and not is_false(keyword.value):
            found.append(f"{keyword.arg}={ast.unparse(keyword.value)}")
    return found


def is_false(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def object_collectives(tree: ast.AST) -> set[str]:
    """Their names, wherever they occur: called, imported, or as the text of a getattr."""
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    names = {n.split(".")[-1] for n in (*used(tree), *imported(tree))}
    return OBJECT_COLLECTIVES & (texts | names)


def mpi_objects(tree: ast.AST) -> list[str]:
    """In a file that has to do with mpi4py: methods that pickle what they send. Those for buffers have a capital. Sockets and
    what the file itself defines may have methods of these names."""
    if not any(within(n, "mpi4py") or within(n, "collectives.mpi") for n in imported(tree)):
        return []
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    known = not_from_mpi(tree)
    return [dotted(f) for f in calls if isinstance(f, ast.Attribute) and f.attr in MPI_OBJECTS and dotted(f.value) not in known]


def not_from_mpi(tree: ast.AST) -> set[str]:
    """Names that stand, wherever the file says, for sockets or instances of its own classes."""
    classes = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    sure, unsure = {"self"} if classes else set(), set()

    def note(target: ast.AST, kind: str, call: bool) -> None:
        good = kind in classes or (kind.endswith(".accept") if call else False) or kind.startswith("socket.")
        (sure if good else unsure).update(n.id for n in ast.walk(target) if isinstance(n, ast.Name))

    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                note(target, dotted(node.value.func) if isinstance(node.value, ast.Call) else "", call=True)
        elif isinstance(node, ast.withitem) and node.optional_vars is not None:
            called = node.context_expr
            note(node.optional_vars, dotted(called.func) if isinstance(called, ast.Call) else "", call=True)
        elif isinstance(node, ast.arg) and node.annotation is not None:
            note(ast.Name(node.arg), dotted(node.annotation), call=False)
    return sure - unsure


def constants(tree: ast.AST) -> dict[str, list[object]]:
    """What names may stand for: constants that are assigned to them, or given as defaults of parameters."""
    found: dict[str, list[object]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                found.setdefault(dotted(target), []).append(node.value.value)
        elif isinstance(node, ast.FunctionDef):
            given = [*node.args.posonlyargs, *node.args.args][::-1]
            pairs = [*zip(given, node.args.defaults[::-1], strict=False)]
            pairs += zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            for argument, default in pairs:
                if isinstance(default, ast.Constant):
                    found.setdefault(argument.arg, []).append(default.value)
    return found


def listening_anywhere(tree: ast.AST) -> list[str]:
    """Sockets bound to all interfaces, and the addresses that mean all of them."""
    known = constants(tree)
    found = [repr(n.value) for n in ast.walk(tree) if isinstance(n, ast.Constant) and n.value in ("0.0.0.0", "::", "[::]")]
    found += [n for n in sorted(used(tree)) if n.split(".")[-1] in ("INADDR_ANY", "IN6ADDR_ANY_INIT", "in6addr_any")]
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = dotted(call.func).split(".")[-1]
        if name == "TCPStore" and not any(k.arg == "master_listen_fd" for k in call.keywords):
            found.append("a TCPStore without a listener of ours, which listens anywhere")
        if name in ("bind", "create_server", "start_server") or name.endswith("Server"):
            places = [a.elts[0] for a in call.args[:1] if isinstance(a, ast.Tuple) and a.elts]
            places += [a for a in call.args[:2] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            places += [k.value for k in call.keywords if k.arg in ("host", "address", "hostname")]
            for place in places:
                values = [place.value] if isinstance(place, ast.Constant) else known.get(dotted(place), [])
                if any(value is None or value in ANYWHERE for value in values):
                    found.append(ast.unparse(call))
    return found


def secrets_of(node: ast.AST) -> set[str]:
    """Names within an expression that a token goes by."""
    names = {n.attr if isinstance(n, ast.Attribute) else n.id for n in ast.walk(node) if isinstance(n, ast.Attribute | ast.Name)}
    return {name for name in names if SECRET.search(name)}


def passed_on(expression: ast.AST) -> set[str]:
    """Names whose values are part of what an expression gives. x.port gives the port alone, x.copy() may give all of x."""
    called = {id(node.func) for node in ast.walk(expression) if isinstance(node, ast.Call)}
    attributes = [node for node in ast.walk(expression) if isinstance(node, ast.Attribute) and id(node) not in called]
    held = {id(node.value) for node in attributes}
    return {node.id for node in ast.walk(expression) if isinstance(node, ast.Name) and id(node) not in held}


def tokens_in_commands(tree: ast.AST) -> list[str]:
    """Command lines of processes that a token flows into, be it by way of variables."""
    flows: dict[str, list[ast.AST]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.NamedExpr) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for name in ast.walk(target):
                    if isinstance(name, ast.Name):
                        flows.setdefault(name.id, []).append(node.value)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in GROWS:
            flows.setdefault(dotted(node.func.value), []).extend(node.args)
    found = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = dotted(call.func)
        if name in STARTS or OS_STARTS.match(name):
            todo: list[ast.AST] = [*call.args, *(k.value for k in call.keywords if k.arg in ("args", "executable"))]
            seen: set[str] = set()
            while todo:
                expression = todo.pop()
                if secrets_of(expression):
                    found.append(f"{name}: {ast.unparse(expression)}")
                for other in passed_on(expression) - seen:
                    seen.add(other)
                    todo += flows.get(other, [])
    return found


def tokens_compared(tree: ast.AST) -> list[str]:
    """Comparisons of a token that take the longer, the more of it is right."""
    compared = [node for node in ast.walk(tree) if isinstance(node, ast.Compare)]
    ways = (ast.Eq, ast.NotEq, ast.In, ast.NotIn)
    return [
        ast.unparse(node)
        for node in compared
        if any(isinstance(op, ways) for op in node.ops) and any(secrets_of(side) for side in (node.left, *node.comparators))
    ]


@each_file_and_script
def test_nothing_is_unpickled_or_evaluated(file: Path) -> None:
    found = unpickling(parse(file))
    if file == ROOT / "scripts" / "train_demo.py":  # starts its own workers on this host, and is no part of what runs
        found = [n for n in found if n != "multiprocessing"]
    if file == ROOT / "qtp" / "reshard" / "bins.py":  # reads what lies in .bin files: tensors alone
        loads = [node for node in ast.walk(parse(file)) if isinstance(node, ast.Call) and dotted(node.func) == "torch.load"]
        assert loads
        assert all("weights_only=True" in [ast.unparse(k) for k in call.keywords] for call in loads)
        found = [n for n in found if n != "torch.load"]
    assert not found


@each_file_and_script
def test_no_object_collectives(file: Path) -> None:
    assert not object_collectives(parse(file))


@each_file_and_script
def test_mpi_carries_buffers_only(file: Path) -> None:
    assert not mpi_objects(parse(file))


@each_file_and_script
def test_nothing_listens_on_all_interfaces(file: Path) -> None:
    assert not listening_anywhere(parse(file))


@each_file_and_script
def test_no_token_is_on_a_command_line(file: Path) -> None:
    assert not tokens_in_commands(parse(file))


@each_file_and_script
def test_tokens_are_compared_in_constant_time(file: Path) -> None:
    if not file.relative_to(ROOT).as_posix().startswith(NO_SECRETS):
        assert not tokens_compared(parse(file))


def test_the_token_is_compared_somewhere() -> None:
    assert "hmac.compare_digest" in used(parse(ROOT / "qtp/wire/frames.py"))


@each_file
def test_every_module_says_what_it_is(file: Path) -> None:
    assert ast.get_docstring(parse(file)), file


@each_file
def test_no_file_has_two_jobs(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 500


@each_file
def test_imports_go_one_way(file: Path) -> None:
    room = file.relative_to(ROOT).parts[0]
    above = {"collectives": ("launch", "qtp"), "launch": ("qtp",), "qtp": ()}[room]
    assert not [n for n in imported(parse(file)) if any(within(n, module) for module in above)]


def test_the_checks_see_what_they_look_for() -> None:
    tree = ast.parse(
        "import torch.distributed as d\nfrom torch import load, distributed\nimport os\nos.environ['A']\ntorch.load(f)"
    )
    assert {"torch.distributed", "torch.load", "os"} <= set(imported(tree))
    assert {"os.environ", "torch.load"} <= used(tree)


SEEN = [
    (unpickling, "import pickle"),
    (unpickling, "def f():\n    from pickle import loads"),
    (unpickling, "import multiprocessing.connection"),
    (unpickling, "from torch import load"),
    (unpickling, "import torch\nx = torch.load(f, weights_only=True)"),
    (unpickling, "import torch\nread = torch.jit.load"),
    (unpickling, "from torch.multiprocessing import Queue"),
    (unpickling, "from mpi4py import futures"),
    (unpickling, "MPI.pickle.loads(x)"),
    (unpickling, "numpy.load(f, allow_pickle=True)"),
    (unpickling, "subprocess.run('ls', shell=True)"),
    (unpickling, "AutoModel.from_pretrained(x, trust_remote_code=flag)"),
    (unpickling, "eval(x)"),
    (object_collectives, "dist.broadcast_object_list(x)"),
    (object_collectives, "from torch.distributed import all_gather_object as g"),
    (object_collectives, "getattr(dist, 'gather_object')(x)"),
    (object_collectives, "send = dist.scatter_object_list"),
    (object_collectives, "socket.recv_pyobj()"),
    (mpi_objects, "from mpi4py import MPI\nMPI.COMM_WORLD.bcast(x)"),
    (mpi_objects, "def f():\n    import mpi4py.MPI\n    comm.allreduce(x)"),
    (mpi_objects, "from collectives.mpi import library\nself._comm.sendrecv(x, 1)"),
    (mpi_objects, "from mpi4py import MPI\ncomm.Split(0).gather(x)"),
    (mpi_objects, "from mpi4py import MPI\nclass Talk: ...\ntalk = Talk()\ndef f(talk: MPI.Comm): talk.gather(4)"),
    (mpi_objects, "from mpi4py import MPI\nclass Talk:\n    def gather(self, x): return self._comm.gather(x)"),
    (listening_anywhere, "s.bind(('', 80))"),
    (listening_anywhere, "s.bind(('0.0.0.0', 80))"),
    (listening_anywhere, "socket.create_server(('::', 0))"),
    (listening_anywhere, "HOST = ''\nsocket.create_server((HOST, 0))"),
    (listening_anywhere, "def listen(address=''):\n    s.bind((address, 0))"),
    (listening_anywhere, "def listen(*, address: str | None = None):\n    s.bind((address, 0))"),
    (listening_anywhere, "asyncio.start_server(f, host='')"),
    (listening_anywhere, "HTTPServer(('', 8000), H)"),
    (listening_anywhere, "place = '0.0.0.0' if x else y"),
    (listening_anywhere, "s.bind((socket.INADDR_ANY, 0))"),
    (listening_anywhere, "dist.TCPStore(host, port, is_master=True)"),
    (tokens_in_commands, "subprocess.Popen(['x', '--token', token])"),
    (tokens_in_commands, "subprocess.run([*argv, f'--token={rendezvous.token}'])"),
    (tokens_in_commands, "argv = ['x']\nargv += [self._token]\nsubprocess.Popen(argv)"),
    (tokens_in_commands, "argv = ['x']\nargv.append(TOKEN)\nsubprocess.Popen(list(argv))"),
    (tokens_in_commands, "a = new_token()\nb = [a]\nsubprocess.run(args=b)"),
    (tokens_in_commands, "a = {'x': token}\nb = a.copy()\nsubprocess.run([*b.values()])"),
    (tokens_in_commands, "os.execv(path, ['x', secret])"),
    (tokens_in_commands, "os.posix_spawnp('x', [f'{token}'], {})"),
    (tokens_compared, "hello.token == self._token"),
    (tokens_compared, "hello.token.encode() != expected"),
    (tokens_compared, "if given == TOKEN: pass"),
    (tokens_compared, "token in known"),
]
UNSEEN = [
    (unpickling, "import json\nmodel.eval()\nsubprocess.run(['ls'], shell=False)\nnumpy.load(f, allow_pickle=False)"),
    (object_collectives, "dist.broadcast(x)\ncomm.all_gather(x)"),
    (mpi_objects, "from mpi4py import MPI\ncomm.Bcast(x)\nself.all_gather(x)\ntalk.broadcast(x)"),
    (mpi_objects, "connection.recv(4)\ncomm.send(x)"),
    (listening_anywhere, "HOST = '127.0.0.1'\nsocket.create_server((HOST, 0))\ntext = ''\nself.bind(x)"),
    (listening_anywhere, "dist.TCPStore(host, port, master_listen_fd=fd)"),
    (tokens_in_commands, "subprocess.Popen(argv, env={'QTP_TOKEN': token})\nargv = [x, tokenizer, max_tokens]"),
    (tokens_in_commands, "leader = Leader(token)\nsubprocess.Popen(['x', str(leader.port)])"),
    (tokens_compared, "hmac.compare_digest(hello.token, token)\nif not token: pass\ntokens == 3\nx = token is None"),
]


@pytest.mark.parametrize(("check", "source"), SEEN)
def test_the_checks_of_security_see_what_they_look_for(check: Callable[[ast.AST], Collection[str]], source: str) -> None:
    assert check(ast.parse(source))


@pytest.mark.parametrize(("check", "source"), UNSEEN)
def test_the_checks_of_security_let_the_rest_pass(check: Callable[[ast.AST], Collection[str]], source: str) -> None:
    assert not check(ast.parse(source))


LIGHT = ("qtp.engine.engine", "qtp.engine.scheduler", "qtp.wire.channel", "qtp.layout.split", "qtp.layout.coverage")
LIGHT += (
    "qtp.kv.blocks",
    "qtp.weights.names",
    "qtp.weights.store",
    "qtp.weights.checkpoint",
    "qtp.config",
    "qtp.engine.sampling_params",
    "launch.detect",
)


@pytest.mark.parametrize("module", LIGHT)
def test_plain_parts_do_not_load_torch(module: str) -> None:
    code = f"import {module}, sys; print(sorted({{n.split('.')[0] for n in sys.modules}} & {{'torch', 'numpy', 'transformers'}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
