"""Text of a growing list of tokens, and stop texts in it."""

from collections.abc import Sequence
from typing import Protocol


class Decoder(Protocol):
    def decode(self, token_ids: Sequence[int]) -> str: ...


class Detokenizer:
    """Decodes token by token. Bytes of a character that is not complete yet are held back until it is.

    A byte-level token may change how its left neighbour decodes only within one window, so each step decodes just the
    tokens since the last text that was complete.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._ids: list[int] = []
        self._from = 0
        self._read = 0
        self.text = ""

    def add(self, token_id: int) -> None:
        self._ids.append(token_id)
        known = self._decoder.decode(self._ids[self._from : self._read])
        now = self._decoder.decode(self._ids[self._from :])
        if len(now) > len(known) and not now.endswith("\ufffd"):
            self._accept(known, now)

    def flush(self) -> None:
        """No more tokens come: takes what was held back as it is."""
        self._accept(self._decoder.decode(self._ids[self._from : self._read]), self._decoder.decode(self._ids[self._from :]))

    def _accept(self, known: str, now: str) -> None:
        self.text += now[len(known) :]
        self._from, self._read = self._read, len(self._ids)


def find_stop(text: str, stops: Sequence[str], known: int) -> int | None:
    """Where the first stop text begins in `text`, of which the first `known` characters were searched before; None: nowhere."""
    places = [text.find(stop, max(0, known - len(stop) + 1)) for stop in stops]
    return min((place for place in places if place >= 0), default=None)
