"""Which variants of the kernels of attention and of the greedy head steps of many kinds ask for on a CUDA card, without one:
launches are caught, and told apart as Triton does. Prints as JSON, by kernel, how many there are. A process of its own, for in
Triton's interpreter, which tests run kernels in, there are no variants.
"""

import json
import sys
from collections import defaultdict
from typing import Any

import torch
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction

found: dict[str, set[Any]] = defaultdict(set)
BACKEND = type(make_backend(GPUTarget("cuda", 90, 32)))


def _noted(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    values, key = dict(zip(self.arg_names, args, strict=False)) | kwargs, []
    for param in self.params:
        value, fixed = values[param.name], (not param.do_not_specialize, not param.do_not_specialize_on_alignment)
        key.append(str(value) if param.is_constexpr else native_specialize_impl(BACKEND, value, param.is_const, *fixed))
    found[self.fn.__name__].add(tuple(key))


def main() -> None:
    JITFunction.run = _noted
    from qtp.attention.triton_backend import TritonAttention
    from qtp.batch import make_batch
    from qtp.kernels.triton.vocabulary import VocabularyHead
    from qtp.kv.cache import KVCache

    host = torch.device("cpu")
    kv_heads = int(sys.argv[1])
    cache = KVCache(1, 400, 16, kv_heads, 64, torch.bfloat16, host, None)
    backend = TritonAttention(cache, tuple(i // 2 for i in range(2 * kv_heads)), host)
    for decodes in range(41):
        for chunks in range(4):
            parts = [((1,), 3, (i,)) for i in range(decodes)] + [((1,) * 9, 3, (100 + i,)) for i in range(chunks)]
            if not parts:
                continue
            batch = make_batch([(tuple(ids), start, table) for ids, start, table in parts], 16, host)
            tokens = len(batch.token_ids_T)
            backend.run(
                backend.plan(batch, *torch.ones(2, tokens, 32)),
                0,
                torch.zeros(tokens, 4 * kv_heads, 64, dtype=torch.bfloat16),
                None,
            )
    head = VocabularyHead(torch.zeros(2100, 64, dtype=torch.bfloat16))
    for tokens in range(2, 17):  # which go by one size of tiles
        head.best(torch.zeros(tokens, 64, dtype=torch.bfloat16), 1, 2100)
    print(json.dumps({name: len(keys) for name, keys in found.items()}))


main()
