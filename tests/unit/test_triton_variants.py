"""Steps of other batches find kernels that are compiled: each variant that is first met while serving holds up all sequences."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("triton_variants.py")


@pytest.mark.parametrize("kv_heads", [1, 4, 8])
def test_batches_of_all_kinds_share_their_kernels(kv_heads: int) -> None:
    """`decode` has one each for contexts that are whole, cut, and cut into many parts; `merge` one for few parts and for more."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, SCRIPT, str(kv_heads)], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == {"turn_and_write": 1, "prefill": 1, "decode": 3 - (kv_heads == 1), "merge": 2, "_some_tokens": 1, "_merge": 1}
