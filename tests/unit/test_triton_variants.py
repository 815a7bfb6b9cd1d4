"""Steps of other batches find kernels that are compiled: each variant that is first met while serving holds up all sequences."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("triton_variants.py")


def test_batches_of_all_kinds_share_their_kernels() -> None:
    """`decode` has one each for contexts that are whole, cut, and cut into many parts; `merge` one for 8 parts, 16 and those of
    whole tiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == {"turn_and_write": 1, "prefill": 1, "decode": 3, "merge": 3, "_some_tokens": 1, "_merge": 1}
