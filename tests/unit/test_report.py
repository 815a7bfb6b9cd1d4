"""Whether an output file can be written: asked by every rank of a host at once, and told in one line."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qtp.report import check_writable


def test_ranks_that_ask_at_once_do_not_trip_over_each_other(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        for asked in [pool.submit(check_writable, tmp_path / "out.jsonl", "--output") for _ in range(2000)]:
            asked.result()
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    for path, told in [
        (tmp_path, "is a folder; name a file"),
        (tmp_path / "no" / "out.jsonl", "its folder does not exist; name a file in a folder that does"),
        (tmp_path / ("x" * 252), "cannot be written (File name too long); name another place"),
    ]:
        with pytest.raises(ValueError, match=f"^--output {re.escape(f'{path}: {told}')}$"):
            check_writable(path, "--output")
