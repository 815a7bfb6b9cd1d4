"""The main job, in the words of MindIE's run_pa: `torchrun -m qtp.run_pa --model DIR --tp 8 --input_texts "..."`."""

import argparse
import logging
import sys
from dataclasses import replace
from pathlib import Path

from launch import mpi
from launch.detect import detect
from qtp.cli import Parser, boolean, run
from qtp.config import EngineConfig
from qtp.engine.engine import check_request, longest
from qtp.engine.outputs import RequestOutput
from qtp.engine.sampling_params import SamplingParams
from qtp.inputs import Inputs, Prompt
from qtp.kv.blocks import BlockPool
from qtp.llm import LLM, prepare
from qtp.report import Stream, check_writable, print_answers, write_jsonl, write_statistics
from qtp.resolve import blocks_of
from qtp.tokenizer import Tokenizer

log = logging.getLogger("qtp")

_LATER = {
    "dp": "data parallelism",
    "pp": "pipeline parallelism",
    "sp": "sequence parallelism",
    "cp": "context parallelism",
}


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="qtp.run_pa", description="Generate text with a Qwen checkpoint on one or many ranks.", allow_abbrev=False)
    p.add_argument(
        "--model", "--model_path", required=True, metavar="DIR", help="checkpoint folder, or a hub id such as Qwen/Qwen2.5-0.5B"
    )
    inputs = p.add_argument_group("what to run (priority: input_dict, input_ids, input_file with --is_chat_model, input_texts)")
    inputs.add_argument(
        "--input_texts", nargs="+", default=["What's deep learning?"], help="texts, or paths of files with the text"
    )
    inputs.add_argument("--input_ids", nargs="+", metavar="1,2,3")
    inputs.add_argument("--input_file", metavar="JSONL", help="each line a list of {role, content}")
    inputs.add_argument("--input_dict", metavar="JSON", help='[{"prompt": text, "adapter": id}]')
    inputs.add_argument("--is_chat_model", action="store_true", help="put texts through the chat template")
    inputs.add_argument("--chat_template", metavar="FILE|JINJA")
    inputs.add_argument("--load_tokenizer", type=boolean, default=True, metavar="True|False", help="False: ids in, ids out")
    inputs.add_argument("--max_batch_size", type=int, default=1, help="one input is repeated so often; requests in a step")
    inputs.add_argument(
        "--max_prefill_batch_size", type=int, metavar="N", help="prompts that start together; default max_batch_size"
    )
    inputs.add_argument("--max_input_length", type=int, default=1024)
    inputs.add_argument("--max_output_length", type=int, default=20)
    inputs.add_argument("--ignore_eos", action="store_true")

    sampling = p.add_argument_group("sampling")
    sampling.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    sampling.add_argument("--top_p", type=float, default=1.0)
    sampling.add_argument("--top_k", type=int, default=0)
    sampling.add_argument("--repetition_penalty", type=float, default=1.0)
    sampling.add_argument("--seed", type=int)
    sampling.add_argument("--stop", nargs="+", metavar="TEXT")
    sampling.add_argument("--logprobs", type=int, metavar="N")

    output = p.add_argument_group("output")
    output.add_argument("--output", type=Path, metavar="FILE.jsonl")
    output.add_argument("--statistics", type=Path, metavar="FILE.csv", help="times of each request")

    ranks = p.add_argument_group("ranks and memory")
    ranks.add_argument("--tp", type=int, default=-1, help="-1: the world size")
    ranks.add_argument("--moe_ep", type=int, default=-1, help="groups that share out the experts")
    ranks.add_argument("--moe_tp", type=int, default=-1, help="ranks that cut each expert by columns")
    ranks.add_argument("--dtype", default="auto", help="auto (the checkpoint's), float32, bfloat16, float16")
    ranks.add_argument("--device", default="auto", help="auto, cpu, cuda, npu")
    ranks.add_argument(
        "--communicator",
        default="auto",
        help="auto, solo, shm, gloo, mpi, hierarchical, hierarchical+mpi, nccl, cuda_ipc, hccl, loopback",
    )
    ranks.add_argument("--threads", type=int, help="of each rank; default: its share of the cores")
    ranks.add_argument("--bind_cpu", type=boolean, default=True, metavar="0|1", help="pin each rank to its share of the cores")
    ranks.add_argument("--kernels", default="auto", help="auto, native, triton, torch")
    ranks.add_argument("--load_format", default="auto", help="auto, or dummy: random weights, which need no weight files")
    ranks.add_argument("--enforce_eager", action="store_true", help="no CUDA graphs of decode steps")
    ranks.add_argument("--deterministic", action="store_true", help="the same bits in any company and at 1, 2, 4, 8 ranks")
    ranks.add_argument("--block_size", type=int, default=128, help="tokens in a KV block")
    ranks.add_argument("--num_kv_blocks", type=int, help="default: what the requests need")
    ranks.add_argument(
        "--gpu_memory_utilization", type=float, default=0.9, metavar="0..1", help="of a card's memory, by all that use it"
    )
    ranks.add_argument("--max_prefill_tokens", type=int, default=-1, help="token budget of a step")
    ranks.add_argument("--max_position_embeddings", type=int, help="replaces the config's")
    ranks.add_argument("--timeout", type=float, default=300.0, help="seconds for joining and for a collective")
    ranks.add_argument(
        "--stall_timeout", type=float, default=60.0, metavar="SECONDS", help="after which a rank counts as hung; 0: never"
    )
    ranks.add_argument(
        "--launcher",
        default="auto",
        help="auto: torchrun, mpirun or srun if one of them started this process, else local ranks; local; ray",
    )
    ranks.add_argument("--ray_address", metavar="HOST:PORT", help="of a running Ray cluster; default: one for this run")

    later = p.add_argument_group("accepted for compatibility, or not supported yet")
    later.add_argument("--trust_remote_code", action="store_true", help="accepted; no remote code is ever executed")
    later.add_argument("--is_embedding_model", action="store_true")
    for name in ("lora_modules", "max_loras", "max_lora_rank"):
        later.add_argument(f"--{name}")
    for name, meaning in _LATER.items():
        later.add_argument(f"--{name}", type=int, default=-1, help=meaning)
    return p


def refuse_later(args: argparse.Namespace) -> None:
    """Raises ValueError for a flag whose feature does not exist yet."""
    for name in ("lora_modules", "max_loras", "max_lora_rank"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name}: LoRA is not supported yet; leave the flag out to run the base model")
    if args.is_embedding_model:
        raise ValueError("--is_embedding_model: embedding models are not supported yet; leave the flag out to generate text")
    for name, meaning in _LATER.items():
        if getattr(args, name) not in (-1, 1):
            raise ValueError(f"--{name} {getattr(args, name)}: {meaning} is not supported yet; use --tp alone")


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    return SamplingParams(
        max_tokens=args.max_output_length,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        stop=args.stop,
        ignore_eos=args.ignore_eos,
        logprobs=args.logprobs,
    )


def read_prompts(args: argparse.Namespace, tokenizer: Tokenizer | None) -> list[Prompt]:
    """The prompts, a single one repeated max_batch_size times. Raises ValueError for what cannot be read or is too long."""
    prompts = Inputs(
        texts=args.input_texts,
        ids=args.input_ids,
        file=args.input_file,
        dict=args.input_dict,
        chat=args.is_chat_model,
        chat_template=args.chat_template,
    ).prompts(tokenizer)
    for i, prompt in enumerate(prompts):
        if len(prompt.token_ids) > args.max_input_length:
            raise ValueError(
                f"input {i} has {len(prompt.token_ids)} tokens and --max_input_length is {args.max_input_length}; "
                "shorten it or raise the limit"
            )
    return prompts * args.max_batch_size if len(prompts) == 1 else prompts


def command(argv: list[str] | None) -> int:
    args = parser().parse_args(argv)
    refuse_later(args)
    if args.trust_remote_code:
        log.warning("--trust_remote_code: accepted, and nothing is executed: there is no remote-code path")
    mpi.meet(detect(args.timeout))  # from here on mpirun ends all ranks when one of them fails alone
    for flag in ("output", "statistics"):
        if getattr(args, flag) is not None:
            check_writable(getattr(args, flag), f"--{flag}")
    for flag in ("max_batch_size", "max_prefill_batch_size", "max_input_length", "max_output_length", "max_prefill_tokens"):
        value = getattr(args, flag)
        if value is not None and value < 1 and not (flag == "max_prefill_tokens" and value == -1):
            raise ValueError(f"--{flag} {value} must be at least 1")
    params = sampling_params(args)
    budget = args.max_prefill_tokens if args.max_prefill_tokens != -1 else max(2048, args.max_batch_size)
    config, model = prepare(
        EngineConfig(
            model=args.model,
            tp=args.tp,
            moe_ep=args.moe_ep,
            moe_tp=args.moe_tp,
            dtype=args.dtype,
            kernels=args.kernels,
            enforce_eager=args.enforce_eager,
            load_format=args.load_format,
            deterministic=args.deterministic,
            device=args.device,
            communicator=args.communicator,
            block_size=args.block_size,
            max_num_seqs=args.max_batch_size,
            max_num_batched_tokens=budget,
            max_prefill_seqs=args.max_prefill_batch_size,
            num_kv_blocks=args.num_kv_blocks,
            gpu_memory_utilization=args.gpu_memory_utilization,
            threads=args.threads,
            max_position_embeddings=args.max_position_embeddings,
            timeout=args.timeout,
            bind_cpu=args.bind_cpu,
            stall_timeout=args.stall_timeout,
            launcher=args.launcher,
            ray_address=args.ray_address,
            on_death="exit",
        )
    )
    tokenizer = Tokenizer(Path(config.model)) if args.load_tokenizer else None
    prompts = read_prompts(args, tokenizer)
    assert config.max_model_len is not None
    pool = BlockPool(config.num_kv_blocks or blocks_of(config), config.block_size)
    for prompt in prompts:
        check_request(
            prompt.token_ids,
            params,
            vocab_size=model.vocab_size,
            max_model_len=config.max_model_len,
            pool=pool,
            has_decoder=tokenizer is not None,
        )
    most = sorted(longest(len(p.token_ids), params, config.max_model_len) for p in prompts)[-args.max_batch_size :]
    if config.num_kv_blocks is None:  # a card has room for so many, and is asked for no more than these
        config = replace(config, max_model_len=most[-1])
    elif args.num_kv_blocks is None:
        config = replace(config, num_kv_blocks=min(pool.num_blocks, sum(map(pool.needed, most))))
    with LLM.prepared(config, model, tokenizer, progress=True) as llm:
        outputs, streamed = generate(llm, prompts, params)
    if args.output is not None:
        write_jsonl(args.output, outputs)
    if args.statistics is not None:
        write_statistics(args.statistics, outputs, min(args.max_batch_size, len(outputs)))
    print_answers(outputs, has_text=tokenizer is not None, streamed=streamed)
    return 0


def generate(llm: LLM, prompts: list[Prompt], params: SamplingParams) -> tuple[list[RequestOutput], bool]:
    """The outputs in order, and whether the answer was already shown: one request streams, several show a progress bar."""
    requests = [(p.text, p.token_ids, params) for p in prompts]
    if len(requests) > 1 or llm.tokenizer is None:
        return llm.run(requests, use_tqdm=True), False
    stream = Stream(params.stops, sys.stdout)
    sys.stdout.write("Answer[0]: ")
    try:
        for output in llm.stream(requests):
            stream.show(output.outputs[0])
    finally:  # so that a last line on the terminal begins where lines begin
        sys.stdout.write("\n")
        sys.stdout.flush()
    return [output], True


def main(argv: list[str] | None = None) -> int:
    return run(lambda: command(argv))


if __name__ == "__main__":
    sys.exit(main())
