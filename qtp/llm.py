"""The Python face, in vLLM's words.

What takes long to import, torch before all, is imported where it is used: a user's mistake is told at once, and the ranks that a
lone process starts load it while rank 0 does.
"""

import logging
import os
import sys
import weakref
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from collectives.built import SHM
from collectives.rendezvous import Rendezvous
from launch import mpi
from launch.detect import detect
from qtp.config import EngineConfig, ModelConfig
from qtp.engine.engine import Engine
from qtp.engine.outputs import RequestOutput
from qtp.engine.request import Request as EngineRequest
from qtp.engine.sampling_params import SamplingParams
from qtp.engine.scheduler import Scheduler
from qtp.hub import folder_of
from qtp.kernels.extension import why_not as why_no_kernels
from qtp.kv.blocks import BlockPool
from qtp.resolve import describe, resolve, shares, why_no_triton
from qtp.tokenizer import Tokenizer
from qtp.weights.checkpoint import open_checkpoint
from qtp.weights.names import declare
from qtp.weights.verify import verify
from qtp.worker.launching import launch

if TYPE_CHECKING:
    from launch.watch import Started
    from qtp.worker.ranks import Ranks

log = logging.getLogger("qtp")

Prompt = str | Sequence[int]
Request = tuple[str | None, Sequence[int], SamplingParams]


class LLM:
    """A model on N ranks, and rank 0's engine over them.

        with LLM("Qwen/Qwen2.5-0.5B", tp=2) as llm:
            llm.generate(["Hello"], SamplingParams(max_tokens=32))

    A lone process becomes rank 0 and starts the others. Under a launcher every rank constructs the LLM with the same
    arguments; there the constructor serves rank 0 on every other rank and then leaves the process (SystemExit), so that
    the code after it runs once, and a launch can construct one LLM only. A step that is interrupted or fails ends the LLM.

    Arguments: as EngineConfig. load_tokenizer False: token ids in, token ids out. Raises ValueError for the user's mistakes
    before any weight is read, RankDied when a rank is gone.
    """

    def __init__(
        self,
        model: str,
        tp: int = -1,
        *,
        load_tokenizer: bool = True,
        progress: bool = False,
        **choices: Any,
    ) -> None:
        config, model_config = prepare(EngineConfig(model=model, tp=tp, **choices))
        tokenizer = Tokenizer(Path(config.model)) if load_tokenizer else None
        self._begin(config, model_config, tokenizer, progress)

    @classmethod
    def prepared(cls, config: EngineConfig, model: ModelConfig, tokenizer: Tokenizer | None, progress: bool) -> Self:
        """From what `prepare` gave."""
        llm = cls.__new__(cls)
        llm._begin(config, model, tokenizer, progress)
        return llm

    def _begin(self, config: EngineConfig, model: ModelConfig, tokenizer: Tokenizer | None, progress: bool) -> None:
        rendezvous = mpi.meet(detect(config.timeout))
        if tokenizer is not None:
            config = replace(config, vocab_limit=tokenizer.size)
        self.config, self.model_config, self.tokenizer = config, model, tokenizer
        if rendezvous.rank > 0:
            from qtp.worker.follow import follow

            sys.exit(follow(config, model, rendezvous))
        for line in describe(config, model):
            log.info(line)
        assert config.max_model_len is not None
        self.ranks = _ranks(config, model, rendezvous, progress)
        weakref.finalize(self, self.ranks.close)  # at the latest when the interpreter ends
        for ready in self.ranks.ready:
            told = (ready.rank, ready.bytes_read, ready.weight_bytes, ready.cores)
            log.info("rank %d: read %d bytes, holds %d bytes of weights; %s", *told)
        assert self.ranks.worker is not None
        self.config = replace(config, num_kv_blocks=self.ranks.worker.num_kv_blocks)
        pool = BlockPool(self.ranks.worker.num_kv_blocks, config.block_size)
        self._grown: dict[int, EngineRequest] = {}
        self.engine = Engine(
            self.ranks,
            Scheduler(pool, config.max_num_seqs, config.max_num_batched_tokens, config.max_prefill_seqs),
            vocab_size=model.vocab_size,
            max_model_len=config.max_model_len,
            eos_ids=tuple(dict.fromkeys((*model.eos_token_ids, *(tokenizer.eos_token_ids if tokenizer else ())))),
            decoder=tokenizer,
            ahead=self.ranks.ahead,
        )

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """One finished RequestOutput a prompt, in order. A prompt is text or token ids; sampling_params is one for all (None:
        the defaults) or one for each. Raises ValueError, and runs nothing, if any prompt cannot be served."""
        return self.run(self._requests(prompts, sampling_params), use_tqdm=use_tqdm)

    def run(self, requests: Sequence[Request], *, use_tqdm: bool = False) -> list[RequestOutput]:
        """One finished RequestOutput for each (text or None, token ids, params), in order."""
        from tqdm import tqdm

        outputs: dict[int, RequestOutput] = {}
        with tqdm(total=len(requests), desc="requests", disable=not use_tqdm, leave=False) as bar:
            for request in self._moved(requests):
                if request.finished:
                    outputs[request.request_id] = self.engine.output(request)
                    bar.update()
        return [outputs[i] for i in sorted(outputs)]

    def stream(self, requests: Sequence[Request]) -> Iterator[RequestOutput]:
        """Runs (text or None, token ids, params) requests and yields each one's output so far whenever it has grown. If the
        caller stops iterating, the rest is aborted. Several streams may be read in turns; each step moves all of them on."""
        with closing(self._moved(requests)) as moved:
            yield from map(self.engine.output, moved)

    def _moved(self, requests: Sequence[Request]) -> Generator[EngineRequest, None, None]:
        """As `stream`, the requests themselves: each whenever it has grown, which may have been by several tokens if other
        streams were read meanwhile."""
        for _, ids, params in requests:
            self.engine.check(ids, params)
        mine = {self.engine.add(ids, params, text) for text, ids, params in requests}
        try:
            while mine:
                grown = [self._grown.pop(i) for i in mine & self._grown.keys()]
                for request in grown:
                    if request.finished:
                        mine.discard(request.request_id)
                    yield request
                if not grown:
                    self._grown.update((request.request_id, request) for request in self.engine.advance())
        finally:
            for request_id in mine if self.ranks.alive else ():
                self.engine.abort(request_id)
                self._grown.pop(request_id, None)

    def chat(
        self,
        messages: Sequence[dict[str, str]] | Sequence[Sequence[dict[str, str]]],
        sampling_params: SamplingParams | None = None,
        *,
        chat_template: str | None = None,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """As `generate`, for one conversation ({"role", "content"} each) or several, through the chat template."""
        if self.tokenizer is None:
            raise ValueError("chat needs a tokenizer; construct the LLM with load_tokenizer=True")
        many = [messages] if messages and isinstance(messages[0], dict) else messages
        prompts = [self.tokenizer.chat(conversation, chat_template) for conversation in many]  # type: ignore[arg-type]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def close(self) -> None:
        """Ends all ranks. Harmless when repeated."""
        self.ranks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _requests(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[Request]:
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        many: Sequence[Any] = [prompts] if single else prompts
        each = [params or SamplingParams()] * len(many) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(each) != len(many):
            raise ValueError(f"{len(many)} prompts but {len(each)} sampling_params; give one for all or one for each")
        return [(p if isinstance(p, str) else None, self._ids(p), s) for p, s in zip(many, each, strict=True)]

    def _ids(self, prompt: Prompt) -> Sequence[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise ValueError("a text prompt needs a tokenizer; construct the LLM with load_tokenizer=True or give token ids")
        return self.tokenizer.encode(prompt)


def _ranks(config: EngineConfig, model: ModelConfig, rendezvous: Rendezvous, progress: bool) -> "Ranks":
    """Rank 0's hold on all ranks. Those that this process has to start come first: they import while this rank does."""
    started: Started | None = None
    if rendezvous.size < config.tp and config.communicator != "loopback":
        rendezvous, started = launch(config)
    try:
        from qtp.worker.ranks import Ranks
    except BaseException:  # such as Ctrl-C; from here on Ranks sees to the end of the others
        if started is not None:
            started.stop(grace=0.0)
        if rendezvous.listener is not None:
            os.close(rendezvous.listener)
        raise
    from tqdm import tqdm

    total = shares(model, config.grid(), config.dtype)[0].weight_bytes
    with tqdm(total=total, unit="B", unit_scale=True, desc="weights of rank 0", disable=not progress, leave=False) as bar:

        def read(count: int) -> None:
            bar.update(count)

        return Ranks(config, model, rendezvous, started, read)


def _check_communicator(config: EngineConfig, world_size: int) -> None:
    from collectives.registry import available

    known = sorted({*available(), "loopback"})
    if config.communicator not in known:
        raise ValueError(f"communicator {config.communicator!r} is unknown; choose one of auto, {', '.join(known)}")
    if config.communicator == "solo" and config.tp > 1:
        raise ValueError(f"communicator 'solo' serves one rank, not tp {config.tp}; choose auto")
    if "mpi" in config.communicator and world_size == 1 and config.tp > 1:
        raise ValueError(
            f"communicator {config.communicator!r} needs mpirun or srun; start {config.tp} ranks with one of them, or choose auto"
        )
    if config.communicator == "loopback" and world_size > 1:
        raise ValueError("communicator 'loopback' makes ranks of a lone process's threads; choose auto under a launcher")


def cpu_communicator(config: EngineConfig, rendezvous: Rendezvous) -> str:
    """What CPU ranks talk over where nothing was chosen: shared memory inside a host, gloo between hosts and where the native
    code was not built. The same on every rank of hosts that are alike."""
    if SHM.why_not() is not None:
        return "gloo"
    if rendezvous.size == 1:  # the ranks are yet to be started, by this process
        return "gloo" if config.ray_address is not None else "shm"
    if rendezvous.local_size == rendezvous.size:
        return "shm"
    return "hierarchical"


def cuda_communicator(config: EngineConfig, rendezvous: Rendezvous, cards: int) -> str:
    """What ranks on CUDA devices talk over where nothing was chosen: nccl, which wants a card a rank, or gloo where this host has
    fewer than ranks. Ray gives each rank a card of its own. The same on every rank of hosts that are alike."""
    if rendezvous.size > 1:
        return "gloo" if rendezvous.local_size > cards else "nccl"
    return "gloo" if config.launcher != "ray" and config.tp > cards else "nccl"


def _cuda_devices(config: EngineConfig) -> int:
    """How many CUDA (or ROCm) devices torch finds; it is not asked where the answer does not matter or there is no driver."""
    if config.device not in ("auto", "cuda") or not (_has_nvidia_driver() or Path("/dev/kfd").exists()):
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _has_nvidia_driver() -> bool:
    if sys.platform != "linux":
        return True  # let torch find out
    import ctypes

    try:
        ctypes.CDLL("libcuda.so.1")  # what the CUDA runtime itself looks for
    except OSError:
        return False
    return True


def prepare(config: EngineConfig) -> tuple[EngineConfig, ModelConfig]:
    """Everything that can be settled and refused before a rank is started: the folder, the model's config, all open choices,
    and that the weight files hold every tensor of the model. Reads headers only. The same on every rank."""
    rendezvous = mpi.meet(detect(config.timeout))
    folder = folder_of(config.model)
    model = ModelConfig.load(folder)
    world_size = rendezvous.size
    config = replace(config, model=str(folder))
    asked, any_kernels = config.communicator, config.kernels == "auto"
    chosen = cpu_communicator(config, rendezvous) if asked == "auto" and config.tp != 1 else ""
    cards = _cuda_devices(config)
    config = resolve(
        config,
        model,
        world_size,
        cuda=cards > 0,
        cpu_communicator=chosen,
        cuda_communicator=cuda_communicator(config, rendezvous, cards),
    )
    if asked != "auto":
        _check_communicator(config, world_size)
    elif config.communicator == "gloo" and config.device == "cuda" and rendezvous.rank == 0:
        log.warning("ranks talk over gloo, through host memory: there are more of them on this host than its %d cards", cards)
        if cards == 1 and world_size > 1:
            log.warning("if the launcher shows each rank a card of its own, --communicator nccl is faster")
    elif config.communicator == "gloo" and (reason := SHM.why_not()) and rendezvous.rank == 0:
        log.warning("ranks talk over gloo, which is slower than shared memory: %s", reason)
    if any_kernels and config.device == "cpu" and (reason := why_no_kernels()) and rendezvous.rank == 0:
        log.warning("the arithmetic is torch's own, which is slower than compiled kernels: %s", reason)
    if any_kernels and config.device == "cuda" and (reason := why_no_triton()) and rendezvous.rank == 0:
        log.warning("the arithmetic is torch's own, which is slower than kernels in Triton: %s", reason)
    if config.load_format != "dummy":
        verify(open_checkpoint(folder, model.weight_files, config.grid()), declare(model), config.grid())
    return config, model
