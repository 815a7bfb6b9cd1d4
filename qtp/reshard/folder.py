"""The folder that is written to: never the source, never one that holds something else; each small file whole or not there."""

import fcntl
import os
import stat
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from qtp.reshard.cut import Output
from qtp.weights.manifest import JOURNAL, MANIFEST

_BESIDE = {".json", ".txt", ".jinja", ".model", ".tiktoken", ".md"}  # tokenizer, generation config, description, licence
_NAMES = {"LICENSE", "NOTICE"}
_MOST = 64 << 20  # bytes of such a file


def put(path: Path, content: bytes) -> None:
    """Writes a file so that it is either there with all its content or as it was before."""
    temporary = _temporary(path)
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def beside(source: Path) -> list[str]:
    """What goes along with the weights: the small files of a folder, without config.json, an index of its weight files, and what
    the resharder itself leaves."""
    return sorted(
        path.name
        for path in source.iterdir()
        if (path.suffix in _BESIDE or path.name in _NAMES)
        and path.is_file()
        and path.stat().st_size <= _MOST
        and not path.name.startswith(".")
        and not path.name.endswith(".index.json")
        and path.name not in ("config.json", MANIFEST, JOURNAL)
    )


def check_apart(source: Path, target: Path) -> None:
    """Raises ValueError if one of the folders lies in the other, or they are the same one."""
    here, there = target.resolve(), source.resolve()
    if here == there or (target.exists() and target.samefile(source)):
        raise ValueError(f"--save_directory {target} is the input itself; choose another folder")
    if here.is_relative_to(there) or there.is_relative_to(here):
        inner, outer = ("the input", "--save_directory") if there.is_relative_to(here) else ("--save_directory", "the input")
        raise ValueError(f"--save_directory {target}: {inner} lies inside {outer}; choose another folder")


@contextmanager
def entered(target: Path) -> Iterator[None]:
    """Makes the folder if need be, and keeps other reshards out of it meanwhile. ValueError if there is one, or it is a file."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"--save_directory {target}: is a file; choose another name")
    try:
        target.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(target, os.O_RDONLY)
    except OSError as error:
        raise ValueError(f"--save_directory {target}: cannot be made ({error.strerror}); choose another folder") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--save_directory {target}: another reshard is writing there; wait for its end") from None
        yield
    finally:
        os.close(descriptor)


def check_holds(target: Path, outputs: Sequence[Output], small: Collection[str], sources: Sequence[Path]) -> None:
    """Raises ValueError if the folder holds anything but what a reshard with these outputs and small files leaves there, or if a
    file there is another name of one outside, such as one of the sources."""
    files = {output.path for output in outputs} | {MANIFEST, JOURNAL, *small}
    files |= {_temporary(Path(name)).name for name in (MANIFEST, JOURNAL, *small)}
    folders = {parent for output in outputs if (parent := output.path.rpartition("/")[0])}
    known = {(s.st_dev, s.st_ino) for s in map(os.stat, sources)}
    ours = JOURNAL in (names := set(os.listdir(target))) or MANIFEST in names
    if names and not ours and names != {_temporary(Path(JOURNAL)).name}:
        raise ValueError(f"--save_directory {target}: is not empty (it holds {min(names)}); choose a new folder")
    for path in _inside(target, folders):
        name, found = path.relative_to(target).as_posix(), path.lstat()
        if name in folders and stat.S_ISDIR(found.st_mode):
            continue
        if name not in files or not stat.S_ISREG(found.st_mode):
            raise ValueError(f"--save_directory {target}: holds {name}, which is not of this reshard; choose a new folder")
        if found.st_nlink > 1 or (found.st_dev, found.st_ino) in known:
            raise ValueError(f"{path}: is another name of a file elsewhere (a hard link); choose a new folder")


def _inside(target: Path, folders: Collection[str]) -> Iterator[Path]:
    for path in target.iterdir():
        yield path
        if path.name in folders and path.is_dir() and not path.is_symlink():
            yield from path.iterdir()


def opened(target: Path, outputs: Sequence[Output]) -> list[int]:
    """A descriptor for each output, in its final size, which the file system has set aside. OSError if it cannot."""
    found: list[int] = []
    try:
        for output in outputs:
            path = target / output.path
            path.parent.mkdir(exist_ok=True)
            found.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666))
            if os.fstat(found[-1]).st_size != output.size:
                os.ftruncate(found[-1], 0)
            os.posix_fallocate(found[-1], 0, output.size)
    except OSError as error:
        for descriptor in found:
            os.close(descriptor)
        raise OSError(f"{target / output.path}: {error.strerror or error}") from None
    return found
