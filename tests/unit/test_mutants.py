"""What `make mutants` would change stands in the code, and the tests it names exist: all of it takes too long for every day."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("mutant_table", ROOT / "scripts" / "mutant_table.py")
assert SPEC is not None
assert SPEC.loader is not None
MODULE = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = MODULE
SPEC.loader.exec_module(MODULE)


@pytest.mark.parametrize("mutant", MODULE.MUTANTS, ids=lambda mutant: mutant.name)
def test_it_can_be_tried(mutant: Any) -> None:
    for change in mutant.changes:
        assert (ROOT / change.file).read_text(encoding="utf-8").count(change.old) == 1, change
        assert change.new != change.old
    for test in mutant.tests:
        file, _, name = test.partition("::")
        assert Path(file).suffix == ".py", f"{test}: not all tests of a folder, of which this one would fail for any mutant"
        assert f"def {name.partition('[')[0]}" in (ROOT / file).read_text(encoding="utf-8"), test


def test_names_tell_them_apart() -> None:
    names = [mutant.name for mutant in MODULE.MUTANTS]
    assert len(set(names)) == len(names) > 100
