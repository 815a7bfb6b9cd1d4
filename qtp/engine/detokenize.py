"""Text of a growing list of tokens, and stop texts in it."""

from collections.abc import Sequence
from typing import Protocol


class Decoder(Protocol):
    def decode(self, token_ids: Sequence[int]) -> str: ...


class Detokenizer:
    """Text so far of tokens that come one by one. Bytes of a character that is not complete yet are held back until it is.

    Nothing is decoded before the text is asked for. A byte-level token may change how its left neighbour decodes only within
    one window, so just the tokens since the last text that was complete are decoded then.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._ids: list[int] = []
        self._from = 0
        self._read = 0
        self._seen = 0
        self._text = ""

    def add(self, token_id: int) -> None:
        self._ids.append(token_id)

    @property
    def text(self) -> str:
        if self._seen < len(self._ids):
            self._seen = len(self._ids)
            known = self._known()
            for end in range(self._seen, self._read, -1):
                now = self._decoder.decode(self._ids[self._from : end])
                if len(now) > len(known) and not now.endswith("\ufffd"):
                    self._accept(known, now, end)
                    break
        return self._text

    def flush(self) -> None:
        """No more tokens come: takes what was held back as it is."""
        self._seen = len(self._ids)
        self._accept(self._known(), self._decoder.decode(self._ids[self._from :]), self._seen)

    def _known(self) -> str:
        return self._decoder.decode(self._ids[self._from : self._read]) if self._read > self._from else ""

    def _accept(self, known: str, now: str, end: int) -> None:
        self._text += now[len(known) :]
        self._from, self._read = self._read, end


def find_stop(text: str, stops: Sequence[str], known: int) -> int | None:
    """Where the first stop text begins in `text`, of which the first `known` characters were searched before; None: nowhere."""
    places = [text.find(stop, max(0, known - len(stop) + 1)) for stop in stops]
    return min((place for place in places if place >= 0), default=None)
