"""A BF16 GGUF file, as llama.cpp reads it, from a Hugging Face checkpoint of a dense Qwen2 model in bfloat16.

    python scripts/bench/write_gguf.py --model DIR --out FILE

Needs the package gguf, and neither torch nor this project. Matrices keep their bytes; vectors (norms, biases) become float32,
as llama.cpp wants them. The file holds no vocabulary: it is for token ids in, token ids out.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import (  # type: ignore[import-not-found]
    MODEL_ARCH,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    get_tensor_name_map,
)


def stored(folder: Path) -> Iterator[tuple[str, list[int], "np.ndarray[Any, Any]"]]:
    """Name, shape and bfloat16 bits (uint16, mapped from the file) of every tensor. Raises ValueError for another dtype."""
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as f:
            size = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(size))
        content = np.memmap(file, dtype=np.uint8, mode="r", offset=8 + size)
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            if tensor["dtype"] != "BF16":
                raise ValueError(f"{file}: {name} is {tensor['dtype']}; make the checkpoint with --dtype bfloat16")
            begin, end = tensor["data_offsets"]
            yield name, tensor["shape"], content[begin:end].view(np.uint16).reshape(tensor["shape"])


def write(folder: Path, out: Path) -> None:
    """Raises ValueError for a model that is not a dense Qwen2 with plain rope, or not in bfloat16."""
    config = json.loads((folder / "config.json").read_text())
    if config.get("architectures") != ["Qwen2ForCausalLM"]:
        raise ValueError(f"{folder}: {config.get('architectures')} is not written as GGUF; only Qwen2ForCausalLM is")
    if config.get("rope_scaling") or config.get("use_sliding_window"):
        raise ValueError(f"{folder}: rope_scaling and sliding windows are not written as GGUF; use a model without")
    names = get_tensor_name_map(MODEL_ARCH.QWEN2, config["num_hidden_layers"])
    writer = GGUFWriter(out, "qwen2")
    writer.add_file_type(LlamaFileType.MOSTLY_BF16)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for name, shape, bits in stored(folder):
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise ValueError(f"{folder}: tensor {name} has no name in a qwen2 GGUF")
        if len(shape) == 1:
            writer.add_tensor(known, (bits.astype(np.uint32) << 16).view(np.float32))
        else:
            writer.add_tensor(known, bits.view(np.uint8), raw_dtype=GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, type=Path)
    p.add_argument("--out", required=True, type=Path)
    args = p.parse_args()
    part = args.out.with_name(args.out.name + ".part")  # so that a file of that name is a whole one
    try:
        write(args.model, part)
    except ValueError as error:
        sys.exit(str(error))
    part.replace(args.out)


if __name__ == "__main__":
    main()
