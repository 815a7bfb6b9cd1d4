"""Where the time of a decode step goes, on every rank.

    python scripts/bench/step_profile.py --model DIR [--tp 2] [--batch 1 8 64] [--steps 48] [--context 128] [--json FILE]

Runs `LLM.generate` greedily on prompts of --context random ids (--stream: reads `LLM.stream`, which builds every output after
every step; --top-k: draws) and takes the steps in which all --batch sequences decode. A step lasts from one call of a worker's
`execute` to the next one. What is timed is wrapped from outside, in this process and in those of the other ranks; each name gets
the time inside its calls less that of the names inside these, so the names of a rank add up to the step. Figures are medians over
steps, in microseconds. Sums inside a half of a block that is one native call are part of `forward`. `outside` is all but kernels
(forward, logits and the search of the vocabulary) and collectives, and, on ranks above 0, the wait for the plan; `decode plan`
runs in a thread of its own and is in no sum. On a machine that others use too, --clock cpu counts the thread's own time instead
of the wall's.
"""

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

sys.path.remove(str(Path(__file__).resolve().parent))  # where another collectives.py is

from collectives.communicator import Communicator
from launch import local
from qtp import LLM, SamplingParams
from qtp.engine.engine import Engine
from qtp.engine.scheduler import Scheduler
from qtp.tokenizer import Tokenizer
from qtp.wire import frames
from qtp.wire.channel import Leader, SocketFollower
from qtp.wire.messages import StepPlan, StepResult
from qtp.worker import __main__ as child
from qtp.worker import sampling
from qtp.worker.worker import Worker

KERNELS = ("forward", "logits", "search")
ORDER = (
    *("schedule", "send plan", "wait for plan", "make batch", "attention plan", *KERNELS, "collectives"),
    *("sampling", "answer", "take results", "outputs", "text", "rest", "outside", "step", "decode plan"),
)
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all", "barrier")
WARM_UP, BUDGET = 8, 8192
Step = dict[str, float]


class Profile:
    """The steps of one rank: what its thread that runs them spends under each name."""

    def __init__(self, clock: str) -> None:
        self._now = CLOCKS[clock]
        self._names: Step = defaultdict(float)
        self._inner: list[float] = []  # for each call that is open: the time of the calls inside it
        self._thread, self._began, self._decoding = 0, 0.0, 0
        self.steps: list[Step] = []
        self.rank = -1

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        """Replaces a method or function by one that is timed as `name`."""
        setattr(owner, attribute, self.timed(name, getattr(owner, attribute)))

    def begin(self, plan: StepPlan) -> None:
        """The worker begins a step, and so ends the one before."""
        now = self._now()
        if self._decoding:
            rest = now - self._began - sum(self._names.values()) + self._names["decode plan"]
            self.steps.append({**self._names, "rest": rest, "batch": self._decoding, "step": now - self._began})
        self._decoding = len(plan.chunks) if all(chunk.count == 1 for chunk in plan.chunks) else 0
        self._thread, self._began = threading.get_ident(), now
        self._names.clear()

    def decoder(self, decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
        """`decode`, timed in whichever thread hears rank 0."""

        def run(frame: bytes) -> Any:
            start = self._now()
            message = decode(frame)
            if isinstance(message, StepPlan):
                self._names["decode plan"] += self._now() - start
            return message

        return run

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
                return call(*args, **kwargs)
            start = self._now()
            self._inner.append(0.0)
            try:
                return call(*args, **kwargs)
            finally:
                whole = self._now() - start
                self._names[name] += whole - self._inner.pop()
                if self._inner:
                    self._inner[-1] += whole

        return run


def install(profile: Profile) -> None:
    """Wraps what this process will run as one rank."""
    wrapped: Any = Worker
    made = wrapped.__init__

    def make(self: Worker, config: Any, model: Any, comm: Communicator, *rest: Any) -> None:
        profile.rank = comm.rank
        for name in COLLECTIVES:
            profile.wrap(comm, name, "collectives")
        made(self, config, model, comm, *rest)
        profile.wrap(self.model, "hidden", "forward")
        profile.wrap(self.model, "logits", "logits")
        profile.wrap(self.model, "best", "search")
        profile.wrap(self.model.backend, "plan", "attention plan")

    profile.wrap(Worker, "_answer", "answer")
    profile.wrap(Worker, "execute", "make batch")
    execute = wrapped.execute

    def begin(self: Worker, plan: StepPlan) -> StepResult:
        profile.begin(plan)
        result: StepResult = execute(self, plan)
        return result

    wrapped.__init__, wrapped.execute = make, begin
    profile.wrap(sampling, "top", "search")
    profile.wrap(sampling.Sampler, "sample", "sampling")
    profile.wrap(Scheduler, "schedule", "schedule")
    profile.wrap(Leader, "send", "send plan")
    profile.wrap(Engine, "advance", "take results")
    profile.wrap(Engine, "output", "outputs")
    profile.wrap(Tokenizer, "decode", "text")
    profile.wrap(SocketFollower, "receive", "wait for plan")
    module: Any = frames
    module.decode = profile.decoder(module.decode)


def run_child(clock: str, file: str, config: str) -> int:
    """A rank above 0: as `python -m qtp.worker CONFIG`, profiled into `file`-RANK."""
    profile = Profile(clock)
    install(profile)
    sys.argv = ["qtp.worker", config]
    try:
        return child.main()
    finally:
        Path(f"{file}-{profile.rank}").write_text(json.dumps(profile.steps))


def run(args: argparse.Namespace, file: str) -> dict[int, list[Step]]:
    """The steps of every rank, rank 0's in this process."""
    module: Any = local
    start = module.start

    def start_profiled(tp: int, argv: Sequence[str], timeout: float) -> Any:
        return start(tp, [sys.executable, __file__, "--child", args.clock, file, argv[-1]], timeout)

    module.start = start_profiled
    profile = Profile(args.clock)
    install(profile)
    count = args.steps + max(args.batch) * args.context // BUDGET + 1  # the first decode while others prefill
    choices = {"max_num_seqs": max(args.batch), "max_model_len": args.context + count, "max_num_batched_tokens": BUDGET}
    with LLM(args.model, tp=args.tp, dtype="bfloat16", load_tokenizer=not args.ids, **choices) as llm:
        vocab = min(llm.tokenizer.size if llm.tokenizer else llm.model_config.vocab_size, llm.model_config.vocab_size)
        greedy = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
        params = replace(greedy, temperature=1.0, top_k=args.top_k, seed=1) if args.top_k else greedy
        for batch in args.batch:
            rng = Random(batch)
            prompts = [[rng.randrange(vocab) for _ in range(args.context)] for _ in range(batch)]
            if args.stream:
                for _ in llm.stream([(None, prompt, params) for prompt in prompts]):
                    pass
            else:
                llm.generate(prompts, params)
    told = {0: profile.steps}
    for rank in range(1, args.tp):
        told[rank] = json.loads(Path(f"{file}-{rank}").read_text())
    return told


def medians(steps: list[Step], batch: int) -> Step:
    """Median microseconds by name over the steps of `batch`, without the first ones."""
    chosen = [step for step in steps if step["batch"] == batch][WARM_UP:]
    for step in chosen:
        apart = (*KERNELS, "collectives", "wait for plan")
        step["outside"] = step["step"] - sum(step.get(name, 0.0) for name in apart)
    return {name: statistics.median(step.get(name, 0.0) * 1e6 for step in chosen) for name in ORDER}


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        return run_child(*sys.argv[2:])
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True)
    p.add_argument("--tp", type=int, default=1)
    p.add_argument("--batch", nargs="+", type=int, default=[1, 8, 64])
    p.add_argument("--steps", type=int, default=48)
    p.add_argument("--context", type=int, default=128)
    p.add_argument("--stream", action="store_true", help="every output after every step")
    p.add_argument("--ids", action="store_true", help="without a tokenizer")
    p.add_argument("--top-k", type=int, default=0, help="draw from as many candidates; 0: greedy")
    p.add_argument("--clock", choices=CLOCKS, default="wall")
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    with tempfile.TemporaryDirectory(prefix="step-profile-") as folder:
        told = run(args, f"{folder}/rank")

    columns = {(rank, batch): medians(steps, batch) for batch in args.batch for rank, steps in told.items()}
    print(f"{'microseconds, median':22}" + "".join(f"{f'rank {rank}, batch {batch}':>20}" for rank, batch in columns))
    for name in ORDER:
        print(f"{name:22}" + "".join(f"{column[name]:20.0f}" for column in columns.values()))
    if args.json is not None:
        rows = [{"tp": args.tp, "rank": rank, "batch": batch, **column} for (rank, batch), column in columns.items()]
        args.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
