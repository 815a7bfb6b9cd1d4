"""The command from start to end: ranks, calibration texts, the run, evaluation, report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qtp.hub import folder_of
from qtp.meeting import meet
from qtp.quantize import report
from qtp.quantize.evaluate import Perplexity, perplexity, sliding
from qtp.quantize.layers import forms
from qtp.quantize.make import Outcome, Source, make
from qtp.quantize.samples import samples, texts
from qtp.quantize.settings import Settings
from qtp.quantize.write import check_target
from qtp.tokenizer import Tokenizer

_DEVICES = {"cpu": "cpu", "gpu": "cuda", "cuda": "cuda", "npu": "npu"}


def quantize(
    asked: Settings,
    flags: Mapping[str, Any],
    chosen: Mapping[str, Any],
    *,
    model: str,
    save_directory: Path,
    calib_file: Path | None,
    calib_texts: Sequence[str] | None,
    calib_length: int,
    calib_dtype: str,
    device_type: str,
    max_shard_size: int,
    evaluate: Path | None,
    timeout: float,
) -> int:
    """The exit code. flags: what the report tells; chosen: what a preset set, which is printed. Everything that can be refused is
    refused before the ranks meet."""
    if device_type not in _DEVICES:
        raise ValueError(f"--device_type {device_type!r} is unknown; choose cpu, gpu or npu")
    if calib_length < 2:
        raise ValueError(f"--calib_length {calib_length} must be at least 2")
    source = Source.open(folder_of(model))
    forms(source.config, asked)
    check_target(source.folder, save_directory)
    tokenizer = Tokenizer(source.folder) if asked.calibrated or evaluate is not None else None
    ids: list[list[int]] = []
    if asked.calibrated and tokenizer is not None:
        ids = samples(texts(calib_file, calib_texts, tokenizer), tokenizer, calib_length, source.config.vocab_size)
    elif calib_file is not None or calib_texts is not None:
        raise ValueError(f"--calib_file and --calib_texts: {asked.kind} needs no calibration; leave them out")
    scored = _scored(evaluate, tokenizer) if evaluate is not None and tokenizer is not None else []

    with meet(source.folder, _DEVICES[device_type], timeout) as comm:
        if comm.rank == 0 and chosen:
            print("preset: " + ", ".join(f"--{name} {value}" for name, value in chosen.items()), flush=True)
        before: Perplexity | None = None
        if scored:
            before = perplexity(source.folder, scored, comm)
        content: dict[str, Any] = {}
        drawn: list[str] = []

        def finishing(outcome: Outcome, folder: Path) -> None:
            content.update(report.as_json(asked, outcome, flags))
            report.write(folder, content)
            drawn.append(report.draw(folder, content))

        dtype = getattr(torch, calib_dtype)
        outcome = make(source, save_directory, asked, ids, comm, dtype=dtype, max_bytes=max_shard_size, finishing=finishing)
        if comm.rank == 0:
            for line in (*report.lines(asked, outcome), *drawn, f"written to {save_directory} in {outcome.seconds:.1f} s"):
                print(line, flush=True)
        if before is not None:
            after = perplexity(save_directory, scored, comm)
            if comm.rank == 0:
                line, content["perplexity"] = report.perplexities(before, after)
                print(line, flush=True)
                report.write(save_directory, content)
    return 0


def _scored(path: Path, tokenizer: Tokenizer) -> list[int]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--evaluate {path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise ValueError(f"--evaluate {path}: is not UTF-8 text; convert the file") from None
    ids = tokenizer.encode(text)
    sliding(len(ids), 2)
    return ids
