"""What all command modules share: how flags are spelt, how a user's mistake looks, and when a command ends."""

import argparse
import io
import logging
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from collectives.errors import CollectiveError
from collectives.network import listens
from collectives.rendezvous import Rendezvous
from launch.detect import detect
from launch.signals import Interrupted, interrupting
from launch.watch import RankDied, last_words

_PATIENCE = 10.0
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


class Parser(argparse.ArgumentParser):
    """argparse that takes every option in both spellings, --max_output_length and --max-output-length, and raises
    ValueError, in one line, for a wrong command line."""

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        given = sys.argv[1:] if args is None else args
        return super().parse_args([_underscored(arg) for arg in given], namespace)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see --help")


def _underscored(arg: str) -> str:
    if not arg.startswith("--"):
        return arg
    name, equals, value = arg.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def boolean(text: str) -> bool:
    """True or False in the spellings that people use."""
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return known[text.lower()]


def byte_count(text: str) -> int:
    """Bytes of 5GB, 500MB, 2GiB or 1000."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?|)B?", text, re.ASCII)
    count = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB, 500MB or 2GiB")
    return count


def run(command: Callable[[], int]) -> int:
    """Runs a command and returns its exit code: 2 after a user's mistake, 1 after a death or when ranks or the system fail, each
    told in one line on stderr, after the traceback where the cause is a fault of the program; 130 after SIGINT, 143 after
    SIGTERM; 141, as after SIGPIPE, when the reader of the output has gone."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # no answer is lost to a terminal that cannot show it
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        with interrupting():
            return command()
    except ValueError as error:
        _say(f"error: {' '.join(str(error).splitlines())}")
        return 2
    except RankDied as death:
        last_words(death)
        return 1
    except Interrupted as signal:
        if detect().rank == 0:
            print(f"ended by {signal}", file=sys.stderr)
        return 128 + signal.signum
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (CollectiveError, OSError) as error:
        _say(f"error: {' '.join(str(error).splitlines())}")
        return 1
    except Exception as error:
        cause = f"{type(error).__name__}: {' '.join(str(error).splitlines())}"
        rank = detect().rank
        if rank == 0:
            last_words(RankDied(rank, socket.gethostname(), os.getpid(), cause, details=traceback.format_exc()))
        else:
            _say(f"error: {cause}")
        return 1


def _say(line: str) -> None:
    """Rank 0 speaks. The others, which fail in the same way, first leave it the time to: launchers end all ranks when the
    first one ends. A rank that is still there after that, while rank 0 waits for it, met something that rank 0 did not, and
    tells."""
    try:
        rendezvous = detect()
    except ValueError:  # the environment itself is the mistake
        rendezvous = Rendezvous()
    if rendezvous.rank > 0:
        time.sleep(_PATIENCE)
        if rendezvous.port and not listens(rendezvous.address, rendezvous.port):
            return
        line = f"rank {rendezvous.rank}: {line}"
    print(line, file=sys.stderr, flush=True)
