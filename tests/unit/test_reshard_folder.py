"""A reshard that is killed goes on, one that is told twice does nothing, a folder that is not its own stays as it is, and what
was spoilt is refused: by --verify in each bit, by a run in what headers show."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtp.layout.spec import Part, Spec
from qtp.layout.split import Grid, Replicate
from qtp.reshard import cut, folder
from qtp.reshard import reshard as module
from qtp.reshard.__main__ import main
from qtp.weights.checkpoint import open_checkpoint
from qtp.weights.manifest import JOURNAL, MANIFEST, Manifest
from qtp.weights.store import Store
from tests.reshard_helper import DENSE, MOE, reshard, same, tensors, write_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "whole", DENSE)
    return tmp_path / "whole"


@pytest.fixture
def parts(whole: Path, capfd: pytest.CaptureFixture[str]) -> Path:
    found = reshard(whole, whole.with_name("parts"), "--tp", 3)
    capfd.readouterr()
    return found


def refused(capfd: pytest.CaptureFixture[str], *argv: object, code: int = 2) -> str:
    """The one line of a command that refuses."""
    capfd.readouterr()
    assert main([str(arg) for arg in argv]) == code
    out, err = capfd.readouterr()
    assert out == ""
    (line,) = err.strip().splitlines()
    assert line.startswith("error: ")
    return line


def content(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


HOOKED = ("pwrite", "write", "replace", "posix_fallocate", "mkdir", "unlink")
KILLED_AT = """
import os, signal, sys
left = int(sys.argv[1])
def hooked(real):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call
os.fsync = os.fdatasync = lambda descriptor: None
for name in {names}:
    setattr(os, name, hooked(getattr(os, name)))
from qtp.reshard.__main__ import main
code = main(sys.argv[2:])
print(-left)
sys.exit(code)
"""


def killed_at(call: int, *argv: object) -> subprocess.CompletedProcess[str]:
    """Runs the command in a process that kills itself, by SIGKILL, at this of its calls of the system; none if it is 0."""
    code = KILLED_AT.replace("{names}", repr(HOOKED))
    command = [sys.executable, "-c", code, str(call), *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("layout", ["parts", "hf"])
def test_a_reshard_that_is_killed_goes_on(layout: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole, target = tmp_path / "whole", tmp_path / "target"
    expected = write_checkpoint(whole, MOE)
    flags = ["--tp", 3, "--moe_tp", 3] if layout == "parts" else ["--format", "hf", "--max_shard_size", "3KB"]
    argv = ["--model", whole, "--save_directory", target, "--workers", 2, *flags]
    done = killed_at(0, *argv)
    assert done.returncode == 0, done.stderr
    calls, result = int(done.stdout.splitlines()[-1]), content(target)
    rng = random.Random(layout)
    moments = [1, 2, 3, *rng.sample(range(4, calls - 8), 5), calls - 4, calls]
    for moment in moments:
        shutil.rmtree(target)
        done = killed_at(moment, *argv)
        assert done.returncode == -signal.SIGKILL, (moment, done.stderr)
        finished = (target / MANIFEST).exists()
        if target.exists() and not finished and any(target.iterdir()):
            with pytest.raises(ValueError, match=r"unfinished reshard|holds no"):
                open_checkpoint(target)
        if moment % 4 == 0:  # and the next one too, if it takes so long
            assert killed_at(moment // 2, *argv).returncode in (-signal.SIGKILL, 0)
        capfd.readouterr()
        assert main([*map(str, argv), "--verify"]) == 0, moment
        assert content(target) == result, moment
    if layout == "hf":
        assert same(tensors(target), expected)


def test_what_is_done_is_not_done_again(whole: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    target, argv = whole.with_name("target"), ["--model", whole, "--save_directory", whole.with_name("target"), "--tp", 4]
    real, calls = os.pwrite, []

    def full(descriptor: int, data: memoryview, offset: int) -> int:
        calls.append(offset)
        if len(calls) > 30:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    line = refused(capfd, *argv, code=1)
    assert line == f"error: {target}: No space left on device; the same command goes on from here when that is mended"
    assert not (target / "config.json").exists()
    done = [json.loads(text)["job"] for text in (target / JOURNAL).read_text().splitlines()[1:]]
    assert len(done) > 3
    spoilt = target / "part1-of-4/model.safetensors"
    first = cut_of(whole, 4, done[0])
    with spoilt.open("r+b") as stream:
        stream.seek(next(slot.offset for slot in first.slots if slot.file == 1))
        stream.write(b"\x55\xaa")

    written: list[int] = []

    def counted(descriptor: int, data: memoryview, offset: int) -> int:
        written.append(len(data))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", counted)
    assert main([str(arg) for arg in (*argv, "--verify")]) == 0
    jobs = {name: cut_of(whole, 4, name).bytes for name in Store(whole).entries}
    headers = sum(file.stat().st_size for file in target.glob("part*/*")) - sum(jobs.values())
    assert sum(written) == headers + sum(size for name, size in jobs.items() if name not in done[1:])
    assert "written now" in capfd.readouterr().out
    written.clear()
    before = {path: path.stat().st_mtime_ns for path in target.rglob("*")}
    assert main([str(arg) for arg in argv]) == 0
    assert "all of them there already" in capfd.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in target.rglob("*")}


def cut_of(whole: Path, tp: int, name: str) -> cut.Job:
    """How a tensor is written."""
    from qtp.config import ModelConfig
    from qtp.weights.names import declare

    found = cut.targets(Store(whole), declare(ModelConfig.load(whole)), Grid.of(tp), "hf", None)
    return next(job for job in cut.in_parts(found, tp, "model")[1] if job.name == name)


def test_a_read_error_is_one_line(whole: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    argv = ["--model", whole, "--save_directory", whole.with_name("target"), "--tp", 2]
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", broken)
        line = refused(capfd, *argv, code=1)
    assert "Input/output error" in line
    assert "the same command goes on" in line
    assert main([*map(str, argv), "--verify"]) == 0


def test_a_full_disk_is_met_before_anything_is_written(
    whole: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    argv = ["--model", whole, "--save_directory", whole.with_name("target"), "--tp", 2]
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        assert "No space left on device" in refused(capfd, *argv, code=1)
    assert main([*map(str, argv), "--verify"]) == 0


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--tp", "4"], "with grid tp 3, not tp 4"),
        (["--format", "hf"], "which is not of this reshard|with format parts, not hf"),
        (["--tp", "3", "--dtype", "float32"], "with dtype as stored, not float32"),
        (["--tp", "3", "--names", "mindformers"], "with names hf, not mindformers"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_another_reshard_into_the_same_folder(
    finished: bool, flags: list[str], named: str, whole: Path, parts: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if not finished:
        unfinish(parts)
    before = content(parts)
    line = refused(capfd, "--model", whole, "--save_directory", parts, *flags)
    assert any(text in line for text in (*named.split("|"), "which is not of this reshard"))
    assert content(parts) == before


def unfinish(parts: Path) -> None:
    """As if the reshard had been killed before its end."""
    manifest = Manifest.load(parts)
    assert manifest is not None
    (parts / MANIFEST).unlink()
    (parts / "config.json").unlink()
    folder.put(parts / JOURNAL, json.dumps({"version": 1, **manifest.request}).encode() + b"\n")


@pytest.mark.parametrize("how", ["content", "time", "another"])
def test_another_source_into_the_same_folder(how: str, whole: Path, parts: Path, capfd: pytest.CaptureFixture[str]) -> None:
    unfinish(parts)
    file = next(whole.glob("*.safetensors"))
    if how == "content":
        with file.open("r+b") as stream:
            stream.seek(-1, os.SEEK_END)
            stream.write(b"\x77")
    os.utime(file, ns=(0, file.stat().st_mtime_ns + (how == "time")))
    source = whole
    if how == "another":
        source = whole.with_name("another")
        write_checkpoint(source, {**DENSE, "vocab_size": 54})
    line = refused(capfd, "--model", source, "--save_directory", parts, "--tp", 3)
    assert "holds an unfinished reshard of another source, or the source has changed since" in line


def test_never_over_its_own_input(whole: Path, parts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = content(tmp_path)
    (tmp_path / "link").symlink_to(whole)
    (tmp_path / "inside").symlink_to(whole / "..")
    for target in (whole, whole / ".", tmp_path / "link", tmp_path / "inside/whole"):
        assert "is the input itself" in refused(capfd, "--model", whole, "--save_directory", target, "--tp", 2)
    assert "lies inside" in refused(capfd, "--model", whole, "--save_directory", whole / "new", "--tp", 2)
    assert "lies inside" in refused(capfd, "--model", whole, "--save_directory", tmp_path, "--tp", 2)
    assert "is the input itself" in refused(capfd, "--model", parts, "--save_directory", parts, "--tp", 2)
    (tmp_path / "link").unlink()
    (tmp_path / "inside").unlink()
    assert content(tmp_path) == before


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_files_that_are_other_names_of_the_input(
    link: Callable[[Path, Path], None], whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = reshard(whole, tmp_path / "two", "--format", "hf")
    target = reshard(other, tmp_path / "target", "--format", "hf", "--names", "hf")
    unfinish(target)
    (target / "model.safetensors").unlink()
    link(other / "model.safetensors", target / "model.safetensors")
    before = content(other)
    line = refused(capfd, "--model", other, "--save_directory", target, "--format", "hf")
    assert "hard link" in line or "not of this reshard" in line
    assert content(other) == before


def test_never_into_a_folder_that_holds_something_else(
    whole: Path, parts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_text("precious")
    assert "is not empty (it holds model.safetensors)" in refused(capfd, "--model", whole, "--save_directory", other, "--tp", 2)
    assert content(other) == {"model.safetensors": b"precious"}
    assert "is a file" in refused(capfd, "--model", whole, "--save_directory", other / "model.safetensors", "--tp", 2)
    unfinish(parts)
    (parts / "part0-of-3/notes.txt").write_text("precious")
    assert "holds part0-of-3/notes.txt" in refused(capfd, "--model", whole, "--save_directory", parts, "--tp", 3)
    with folder.entered(tmp_path / "busy"):
        line = refused(capfd, "--model", whole, "--save_directory", tmp_path / "busy", "--tp", 3)
        assert "another reshard is writing there" in line


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--save_directory", "new"], "--tp is missing"),
        (["--tp", "2"], "--save_directory is missing"),
        (["--save_directory", "new", "--tp", "0"], "moe_ep 0 x moe_tp 1"),
        (["--save_directory", "new", "--tp", "11"], "more than the 10 query heads"),
        (["--save_directory", "new", "--tp", "4", "--moe_ep", "3"], "two factors of 4"),
        (["--save_directory", "new", "--format", "hf", "--tp", "2"], "leave --tp"),
        (["--save_directory", "new", "--format", "gguf"], "--format"),
        (["--save_directory", "new", "--tp", "2", "--max-memory", "0.01"], "--max-memory 0.01 is too little"),
        (["--save_directory", "new", "--tp", "2", "--max-memory", "nan"], "--max-memory nan"),
        (["--save_directory", "new", "--tp", "2", "--workers", "0"], "--workers 0"),
        (["--save_directory", "new", "--format", "hf", "--max_shard_size", "5 parsecs"], "'5 parsecs' is not a size"),
        (["--verify"], f"has no {MANIFEST}"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_that_cannot_be(flags: list[str], named: str, whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = [str(whole.with_name(flag)) if flag == "new" else flag for flag in flags]
    assert named in refused(capfd, "--model", whole, *argv)
    assert not whole.with_name("new").exists()


def test_a_source_that_does_not_fit_its_config(whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = ["--model", whole, "--save_directory", whole.with_name("new"), "--tp", 2]
    (whole / "config.json").write_text(json.dumps({**DENSE, "vocab_size": 54}))
    assert "has shape [53, 20], but config.json asks for [54, 20]" in refused(capfd, *argv)
    (whole / "config.json").write_text(json.dumps({**DENSE, "tie_word_embeddings": False}))
    assert "lm_head.weight is missing" in refused(capfd, *argv)
    assert "no such folder" in refused(capfd, "--model", whole / "nowhere", *argv[2:])
    assert not whole.with_name("new").exists()


def spoil(parts: Path, how: str) -> None:
    part = parts / "part1-of-3/model.safetensors"
    if how == "missing":
        part.unlink()
    elif how == "truncated":
        os.truncate(part, part.stat().st_size - 1)
    elif how == "longer":
        part.write_bytes(part.read_bytes() + b"\0")
    elif how == "swapped":
        other = parts / "part2-of-3/model.safetensors"
        part.rename(parts / "x")
        other.rename(part)
        (parts / "x").rename(other)
    elif how == "foreign":  # cut alike, from a checkpoint of the same shapes
        write_checkpoint(parts.with_name("foreign"), DENSE)
        file = next(parts.with_name("foreign").glob("*-00001-*"))
        save_file({name: x + 1 for name, x in load_file(str(file)).items()}, str(file), metadata={"format": "pt"})
        other = reshard(parts.with_name("foreign"), parts.with_name("other"), "--tp", 3)
        shutil.copy(other / "part1-of-3/model.safetensors", part)
    elif how == "another cut":
        other = reshard(parts.with_name("whole"), parts.with_name("other"), "--tp", 2)
        shutil.copy(other / "part1-of-2/model.safetensors", part)
    elif how == "no manifest":
        (parts / MANIFEST).unlink()
    else:
        text = (parts / MANIFEST).read_text()
        changes = {
            "edited box": (re.search(r'"box": \[\s+\[\s+0,', text)[0], '"box": [[1,'),
            "edited checksum": ('"xxh3": "', '"xxh3": "0'),
            "edited grid": ('"tp": 3', '"tp": 2'),
            "another version": ('"version": 1', '"version": 2'),
            "half": (text[len(text) // 2 :], ""),
        }
        old, new = changes[how]
        (parts / MANIFEST).write_text(text.replace(old, new, 1))


SPOILT = {
    "missing": "is missing",
    "truncated": "truncated or replaced",
    "longer": "truncated or replaced",
    "swapped": "of another cut or another source|truncated or replaced",
    "foreign": "of another cut or another source",
    "another cut": "of another cut or another source|truncated or replaced",
    "no manifest": "without its manifest",
    "edited box": "it is not as it was written",
    "edited checksum": "it is not as it was written",
    "edited grid": "it is not as it was written",
    "another version": "is of version 2, this qtp reads version 1",
    "half": "it is not valid JSON",
}


@pytest.mark.parametrize("how", SPOILT)
def test_parts_that_are_not_as_they_were_written(how: str, parts: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spoil(parts, how)
    with pytest.raises(ValueError, match=SPOILT[how]) as told:
        open_checkpoint(parts, "model", Grid.of(3), 0)
    assert "\n" not in str(told.value)
    assert str(parts) in str(told.value)
    line = refused(capfd, "--model", parts, "--verify")
    assert any(text in line for text in (*SPOILT[how].split("|"), f"has no {MANIFEST}"))
    assert not parts.with_name("new").exists()


def test_each_bit_counts(parts: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(parts), "--verify"]) == 0
    assert "26 tensors are whole and have their checksums" in capfd.readouterr().out
    rng = random.Random(0)
    for part in sorted(parts.glob("part*/*")):
        good = part.read_bytes()
        header = 8 + int.from_bytes(good[:8], "little")
        for at in rng.sample(range(header, len(good)), 6):
            bad = bytearray(good)
            bad[at] ^= 1 << rng.randrange(8)
            part.write_bytes(bad)
            line = refused(capfd, "--model", parts, "--verify")
            assert str(part) in line
            assert "its checksum differs" in line
        part.write_bytes(good)
    assert main(["--model", str(parts), "--verify"]) == 0


def test_equality_with_the_source_is_seen_apart_from_checksums(
    whole: Path, parts: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", str(whole), "--save_directory", str(parts), "--verify"]) == 0
    assert f"and they equal those of {whole}" in capfd.readouterr().out
    file = next(whole.glob("*-00002-*"))
    content = load_file(str(file))
    content["model.norm.weight"][7] = 3
    save_file(content, str(file))
    line = refused(capfd, "--model", whole, "--save_directory", parts, "--verify")
    assert "tensor model.norm.weight differs from that of" in line
    save_file({**content, "more": torch.ones(2)}, str(file))
    (whole / "model.safetensors.index.json").unlink()
    assert "tensor more is in one" in refused(capfd, "--model", whole, "--save_directory", parts, "--verify")


def test_a_run_of_another_grid_is_told_the_command(whole: Path, parts: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="was cut for tp 3, not for tp 2") as told:
        open_checkpoint(parts, "model", Grid.of(2))
    command = str(told.value).partition("; run python -m qtp.reshard ")[2].split()
    assert main(command) == 0
    open_checkpoint(Path(command[command.index("--save_directory") + 1]), "model", Grid.of(2))
    open_checkpoint(parts, "model", Grid.of(3, moe_tp=3))  # no experts: how they would be cut does not matter
    write_checkpoint(tmp_path / "moe", MOE)
    cut = reshard(tmp_path / "moe", tmp_path / "cut", "--tp", 4, "--moe_ep", 2)
    open_checkpoint(cut, "model", Grid.of(4, moe_ep=2))
    with pytest.raises(
        ValueError, match=r"was cut for tp 4, moe_ep 2, moe_tp 2, not for tp 4, moe_ep 4, moe_tp 1; run .* --moe_ep 4"
    ):
        open_checkpoint(cut, "model", Grid.of(4))


def test_the_copy_list_is_proved(whole: Path) -> None:
    """Whatever is taken away from it, moved or doubled is noticed."""
    specs = module.declare(module.ModelConfig.load(whole))
    outputs, jobs = cut.in_parts(cut.targets(Store(whole), specs, Grid.of(3), "hf", None), 3, "model")
    cut.prove(outputs, jobs)
    gate = next(i for i, job in enumerate(jobs) if job.name.endswith("gate_proj.weight"))
    slots = jobs[gate].slots
    moved = replace(slots[1], box=(range(slots[1].box[0].start + 1, slots[1].box[0].stop + 1), slots[1].box[1]))
    changes = {
        "go nowhere": (slots[0], moved, slots[2]),
        "would go nowhere": slots[:2],
        "lie one after the other": (*slots, slots[1]),
        "one after the other": (replace(slots[0], offset=slots[0].offset + 2), *slots[1:]),
        "fill its place": (replace(slots[0], size=slots[0].size - 2), *slots[1:]),
        "not fill its place": (replace(slots[0], taken=((range(1), *slots[0].taken[0][1:]),)), *slots[1:]),
    }
    for named, changed in changes.items():
        with pytest.raises(ValueError, match=named):
            cut.prove(outputs, [*jobs[:gate], replace(jobs[gate], slots=changed), *jobs[gate + 1 :]])


def test_a_split_that_leaves_something_out_is_refused(
    whole: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Short(Replicate):
        def box(self, shape: tuple[int, ...], rank: int, grid: Grid) -> tuple[range, ...]:
            return (range(shape[0] - 1), *map(range, shape[1:]))

    spec = Spec("norm", (Part("model.norm.weight", (20,), Short()),))
    monkeypatch.setattr(module, "declare", lambda config: (spec,))
    argv = ("--model", whole, "--save_directory", whole.with_name("new"), "--tp", 2)
    assert "some elements of tensor model.norm.weight would go nowhere" in refused(capfd, *argv)
    assert not whole.with_name("new").exists()


def test_memory_is_bounded(tmp_path: Path) -> None:
    """100 MB through a process that may have 0.2 GiB, as the operating system counts it."""
    whole = tmp_path / "whole"
    write_checkpoint(whole, {**DENSE, "hidden_size": 1000, "vocab_size": 50_000})
    code = "import sys; from qtp.reshard.__main__ import main; main(sys.argv[1:]); print(open('/proc/self/status').read())"
    for flags in (["--tp", "3"], ["--format", "hf"]):
        argv = ["--model", str(whole), "--save_directory", str(tmp_path / flags[1]), *flags, "--max-memory", "0.2", "--verify"]
        done = subprocess.run(
            [sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
        )
        (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", done.stdout)
        assert int(peak) * 1024 < 0.2 * 2**30
        whole = tmp_path / "3"
