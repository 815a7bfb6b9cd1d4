"""What run_pa prints and writes of its answers."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from qtp.engine.outputs import CompletionOutput, Logprob, RequestOutput

STATISTICS = (
    "batch_size",
    "input_seq_len",
    "output_seq_len",
    "e2e_time(ms)",
    "prefill_time(ms)",
    "decoder_token_time(ms)",
    "decode_throughput(tokens/s)",
)


class Stream:
    """Shows one sequence's text as it grows. Text that may yet be cut off by a stop text is held back until it cannot."""

    def __init__(self, stops: Sequence[str], out: TextIO) -> None:
        self._held = max((len(stop) - 1 for stop in stops), default=0)
        self._shown = 0
        self._out = out

    def show(self, completion: CompletionOutput) -> None:
        stop = len(completion.text) if completion.finish_reason else max(self._shown, len(completion.text) - self._held)
        self._out.write(completion.text[self._shown : stop])
        self._out.flush()
        self._shown = stop


def print_answers(outputs: Sequence[RequestOutput], has_text: bool, streamed: bool) -> None:
    """`Answer[i]: ...` and `Generate[i] token num: (i, N)` of each request; a streamed answer is not printed again."""
    for i, output in enumerate(outputs):
        completion = output.outputs[0]
        if not streamed:
            print(f"Answer[{i}]: {completion.text if has_text else list(completion.token_ids)}")
        print(f"Generate[{i}] token num: ({i}, {len(completion.token_ids)})", flush=True)


def write_jsonl(path: Path, outputs: Sequence[RequestOutput]) -> None:
    """One line a request: index, prompt_token_ids, token_ids, text, finish_reason, logprobs. The file appears whole or not
    at all."""
    part = _part(path)
    with part.open("w", encoding="utf-8") as stream:
        for i, output in enumerate(outputs):
            completion = output.outputs[0]
            line = {
                "index": i,
                "prompt_token_ids": output.prompt_token_ids,
                "token_ids": completion.token_ids,
                "text": completion.text,
                "finish_reason": completion.finish_reason,
                "logprobs": None if completion.logprobs is None else [_plain(told) for told in completion.logprobs],
            }
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
    part.replace(path)


def write_statistics(path: Path, outputs: Sequence[RequestOutput], batch_size: int) -> None:
    """One csv row a request; times in milliseconds. batch_size: the most requests in a step. The file appears whole or not at
    all."""
    part = _part(path)
    with part.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(STATISTICS)
        for output in outputs:
            produced = len(output.outputs[0].token_ids)
            each = output.decode_seconds / max(1, produced - 1)
            times = (1e3 * (output.prefill_seconds + output.decode_seconds), 1e3 * output.prefill_seconds, 1e3 * each)
            speed = 1 / each if each else 0.0
            row = (batch_size, len(output.prompt_token_ids), produced, *(f"{t:.3f}" for t in times), f"{speed:.2f}")
            writer.writerow(row)
    part.replace(path)


def check_writable(path: Path, flag: str) -> None:
    """Raises ValueError if a file cannot be made at `path`. Several ranks may ask at once."""
    if path.is_dir():
        raise ValueError(f"{flag} {path}: is a folder; name a file")
    if not path.parent.is_dir():
        raise ValueError(f"{flag} {path}: its folder does not exist; name a file in a folder that does")
    probe = _part(path)
    try:
        probe.touch()
        probe.unlink(missing_ok=True)  # another rank may have been faster
    except OSError as error:
        raise ValueError(f"{flag} {path}: cannot be written ({error.strerror}); name another place") from None


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _plain(told: dict[int, Logprob]) -> dict[str, dict[str, object]]:
    return {str(i): {"logprob": p.logprob, "rank": p.rank, "decoded_token": p.decoded_token} for i, p in told.items()}
