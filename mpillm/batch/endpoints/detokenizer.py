"""Token ids and their log-probabilities as answers show them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from mpillm.batch.work import Model
from mpillm.engine.request import TopLogprobs
from mpillm.text import IncrementalDecoder, token_id_text

LOWEST = -9999.0  # JSON has no infinity: vLLM's lower bound for log-probabilities


class Detokenizer:
    """Token ids as the strings an answer shows.

    Without a tokenizer, or where the line asks for it, a token is "token_id:17". A text without a tokenizer is
    such words with a space between them. A token that is no UTF-8 of its own is "bytes:\\xf0\\x9f", as OpenAI
    writes it. Control tokens are left out if `skip_special`, except those in `shown`.
    """

    def __init__(
        self,
        model: Model,
        names_token_ids: bool = False,
        skip_special: bool = True,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        self.model = model
        self._text, self._skip_special, self._shown = model.text, skip_special, shown
        self._names_ids = names_token_ids or model.text is None

    def token(self, token: int) -> str:
        """Return one token."""
        if self._names_ids:
            return token_id_text(token)
        raw = self.raw(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def raw(self, token: int) -> bytes:
        """Return the bytes a token stands for."""
        return token_id_text(token).encode() if self._text is None else self._text.token_bytes(token)

    def text(self, ids: Sequence[int], start: bool = True, final: bool = True) -> str:
        """Return the text that tokens make; `start` and `final` as in `Tokenizer.decode`."""
        if self._text is None:
            return " ".join(self.pieces(ids))
        return self._text.decode(ids, self._skip_special, start, final, self._shown)

    def pieces(self, ids: Sequence[int], start: bool = True) -> Iterator[str]:
        """Return the text that each token adds; empty while a character is not complete."""
        if self._text is None:
            return map(self.token, ids)
        decoder = IncrementalDecoder(self._text, self._skip_special, start, self._shown)
        return map(decoder.push, ids)

    def echoed_pieces(self, ids: Sequence[int], given: str | None) -> Iterator[str]:
        """Yield the text of each token of an echoed prompt; of control tokens, those that are in the string `given`."""
        if self._text is None or given is None:
            yield from self.pieces(ids)
            return
        decoder, at = IncrementalDecoder(self._text), 0
        for id in ids:
            piece = self._text.token_text(id) if self._text.is_control(id) else decoder.push(id)
            if self._text.is_control(id) and not given.startswith(piece, at):
                piece = ""  # put there by the tokenizer
            at += len(piece)
            yield piece

    @property
    def gap(self) -> str:
        """The text between two pieces."""
        return " " if self._text is None else ""

    def alternatives(self, top: TopLogprobs) -> dict[str, float]:
        """Log-probabilities by token; of two tokens that look the same, the likelier stays."""
        shown: dict[str, float] = {}
        for token, logprob in top:
            shown.setdefault(self.token(token), finite(logprob))
        return shown


def finite(logprob: float) -> float:
    """Return a log-probability that JSON can write."""
    return max(float(logprob), LOWEST)


def with_chosen(
    ids: Sequence[int], logprobs: Sequence[float], tops: Sequence[TopLogprobs]
) -> Iterator[TopLogprobs]:
    """Yield each token's alternatives, and the token itself where it is not among them."""
    for token, logprob, top in zip(ids, logprobs, tops, strict=True):
        yield top if any(token == other for other, _ in top) else [*top, (token, logprob)]


def offsets(pieces: Iterable[str], gap: int, start: int, end: int) -> Iterator[int]:
    """Yield the place of each piece's beginning, in characters; pieces that a stop string cut off are at the end."""
    for piece in pieces:
        yield min(start, end)
        start += len(piece) + gap
