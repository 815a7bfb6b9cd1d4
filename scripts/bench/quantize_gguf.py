"""A BF16 GGUF file quantized by llama.cpp itself, with its defaults for that type: as its own llama-quantize does it.

    python scripts/bench/quantize_gguf.py SOURCE OUT q8_0|q4_0

Needs the package llama-cpp-python. In Q8_0 (8.5 bits a value) are all matrices, the embedding and the head too. In Q4_0 (4.5
bits) are all but one: the output matrix, and where the model has none of its own (tied), the embedding in its place, is Q6_K (6.6
bits), or Q8_0 if its rows are no multiple of 256 values, as those of Qwen2-0.5B. Vectors (norms, biases) stay float32 in both.
There is no importance matrix.
"""

import sys
from pathlib import Path

import llama_cpp as lib  # type: ignore[import-not-found]

TYPES = {"q8_0": lib.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": lib.LLAMA_FTYPE_MOSTLY_Q4_0}


def main() -> None:
    if len(sys.argv) != 4 or sys.argv[3] not in TYPES:
        sys.exit(f"usage: {sys.argv[0]} SOURCE OUT {'|'.join(TYPES)}")
    source, out = map(Path, sys.argv[1:3])
    part = out.with_name(out.name + ".part")  # so that a file of that name is a whole one
    said: list[str] = []
    hear = lib.llama_log_callback(lambda level, text, data: said.append(text.decode(errors="replace").strip()))
    lib.llama_log_set(hear, None)
    lib.llama_backend_init()
    params = lib.llama_model_quantize_default_params()
    params.ftype = TYPES[sys.argv[3]]
    if status := lib.llama_model_quantize(str(source).encode(), str(part).encode(), params):
        part.unlink(missing_ok=True)
        word = next((text for text in reversed(said) if len(text) > 1), "no word why")
        sys.exit(f"llama_model_quantize returned {status} for {source} ({word})")
    part.replace(out)


if __name__ == "__main__":
    main()
