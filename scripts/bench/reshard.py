"""What a reshard costs against `cp` of the same bytes: python scripts/bench/reshard.py --model DIR [--tp 4] [--rounds 5] [--cold]

Interleaved: each round copies the weight files with cp, then cuts them with qtp.reshard as a process of its own, each into a new
folder that is removed afterwards. Before each, all that was written before is on the disk (sync), and the source is in the page
cache or, with --cold, out of it (POSIX_FADV_DONTNEED). cp returns while its bytes are still in the page cache, which qtp.reshard
does not, so the time until a sync after cp is told too. Where others use the processor, look at the seconds that each had of it
(cpu). Prints a JSON line a round, then the medians; peak_mb is the resident
peak of the process.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def timed(argv: list[str]) -> tuple[float, float, float]:
    """(seconds, seconds of the processor, resident peak in MB) of a process that must succeed."""
    start = time.perf_counter()
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)})
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{argv} ended with {process.returncode}")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def ready(files: list[Path], cold: bool) -> None:
    os.sync()
    for file in files:
        with file.open("rb") as stream:
            if cold:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while stream.read(1 << 24):
                    pass


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, required=True)
    p.add_argument("--out", type=Path, default=Path("/tmp/reshard-bench"), help="a folder on the disk of the model")
    p.add_argument("--tp", type=int, default=4)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--cold", action="store_true")
    p.add_argument("flags", nargs="*", help="more flags for qtp.reshard, after --")
    args = p.parse_args()
    files = sorted(args.model.glob("*.safetensors"))
    rounds = []
    for _ in range(args.rounds):
        args.out.mkdir(parents=True, exist_ok=True)
        ready(files, args.cold)
        start = time.perf_counter()
        cp, cp_cpu, _ = timed(["cp", *map(str, files), str(args.out)])
        os.sync()
        row = {"cp_s": cp, "cp_cpu_s": cp_cpu, "cp_and_sync_s": time.perf_counter() - start}
        shutil.rmtree(args.out)
        ready(files, args.cold)
        words = ["--model", str(args.model), "--save_directory", str(args.out), "--tp", str(args.tp), *args.flags]
        row["reshard_s"], row["reshard_cpu_s"], row["peak_mb"] = timed([sys.executable, "-m", "qtp.reshard", *words])
        shutil.rmtree(args.out)
        row["ratio"] = row["reshard_s"] / row["cp_s"]
        rounds.append(row)
        print(json.dumps({key: round(value, 2) for key, value in row.items()}), flush=True)
    size = sum(file.stat().st_size for file in files)
    medians = {key: round(statistics.median(row[key] for row in rounds), 2) for key in rounds[0]}
    print(json.dumps({"bytes": size, "tp": args.tp, "cold": args.cold, "rounds": len(rounds), **medians}))


if __name__ == "__main__":
    main()
