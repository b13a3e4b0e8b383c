"""The text of an answer, bit by bit, as its tokens are generated."""

from __future__ import annotations

from mpillm.batch.endpoints.detokenizer import Detokenizer
from mpillm.batch.endpoints.generate import Generate
from mpillm.batch.work import Model
from mpillm.spec import Spec
from mpillm.text import IncrementalDecoder, StopStrings


class TextStream:
    """Text of one choice: what `push` and `rest` return makes the text of the answer, in this order.

    All of it comes at the end where tokens alone do not say what the text will be: where the model's format has
    channels, and with echo, special tokens or stop strings in the text.
    """

    def __init__(self, endpoint: Generate, spec: Spec, model: Model) -> None:
        self._detokenizer = Detokenizer(model)
        self._decoder = (
            None
            if model.text is None
            else IncrementalDecoder(model.text, endpoint.skips_special, endpoint.starts_text)
        )
        self._stops = StopStrings(endpoint.stops(spec))
        self._given = ""
        self._at_the_end = (
            self._detokenizer.harmony is not None
            or bool(getattr(endpoint, "echo", None))
            or endpoint.skip_special_tokens is False
            or bool(endpoint.include_stop_str_in_output)
        )

    def push(self, token: int) -> str:
        """The text that a token completes and that no stop string can take back, which may be empty."""
        if self._at_the_end:
            return ""
        if self._decoder is not None:
            more, _ = self._stops.push(self._decoder.push(token))
        else:
            more = f"{self._detokenizer.gap if self._given else ''}{self._detokenizer.token(token)}"
        self._given += more
        return more

    def rest(self, text: str) -> str:
        """What the whole `text` of the answer has beyond what was given."""
        return text.removeprefix(self._given) if text.startswith(self._given) else ""
