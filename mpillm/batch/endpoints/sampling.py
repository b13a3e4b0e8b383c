"""The keys of a body that say how tokens are drawn; where one is absent, the job's [sampling] holds."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta

from mpillm.batch.work import Endpoint, Model
from mpillm.engine.adjust import bits
from mpillm.errors import RequestError, UnsuitedError
from mpillm.spec import Fraction, Penalty, Seed, Spec, Subtracted, Temperature, TopK, TopP, Word

MAX_BIAS = 100.0  # greatest size of a bias; larger ones are cut to it
MAX_WORDS = 1024

Tokens = Annotated[int, Meta(ge=0, le=2**31 - 1)]

_OF_JOB = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
)  # fmt: skip


class Sampled(Endpoint, frozen=True, kw_only=True):
    """A body whose answer is drawn token by token."""

    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: Fraction | None = None
    repetition_penalty: Penalty | None = None
    presence_penalty: Subtracted | None = None
    frequency_penalty: Subtracted | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: Annotated[list[int], Meta(min_length=1)] | None = None
    bad_words: Annotated[list[Word], Meta(max_length=MAX_WORDS)] | None = None
    min_tokens: Tokens | None = None
    seed: Seed | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None

    def settings(self, spec: Spec, model: Model) -> dict[str, Any]:
        """Return the fields of an engine's request that say how its tokens are drawn; RequestError if wrong."""
        own = {key: getattr(self, key) for key in _OF_JOB}
        settings = {
            key: getattr(spec.sampling, key) if value is None else value for key, value in own.items()
        }
        settings["top_k"] = max(settings["top_k"], 0)  # -1 means all, as 0 does
        settings["logit_bias"] = self._biases(model)
        settings["bad_words"] = tuple(sorted(self._bad_words(model)))
        settings["min_tokens"] = self.min_tokens or 0
        settings["stop_ids"] = self._stop_ids(model)
        if self.allowed_token_ids is not None:
            _check_ids("allowed_token_ids", self.allowed_token_ids, model)
            settings["allowed"] = bits(frozenset(self.allowed_token_ids), model.vocab)
        return settings

    def _biases(self, model: Model) -> tuple[tuple[int, float], ...]:
        biases: dict[int, float] = {}
        for key, value in (self.logit_bias or {}).items():
            if not (key.isascii() and key.isdecimal()):
                raise RequestError(f"logit_bias: {key[:60]!r} is not a token id")
            biases[int(key)] = min(max(value, -MAX_BIAS), MAX_BIAS)
        _check_ids("logit_bias", biases, model)
        return tuple(sorted(biases.items()))

    def _bad_words(self, model: Model) -> set[tuple[int, ...]]:
        """Return each word's tokens, as it is spelled within a text and behind a space."""
        if self.bad_words and model.text is None:
            raise UnsuitedError("bad_words need a tokenizer, and the model has none; use logit_bias")
        found: set[tuple[int, ...]] = set()
        for word in self.bad_words or ():
            assert model.text is not None
            bare, spaced = (tuple(model.text.encode(space + word.lstrip(), False)) for space in ("", " "))
            # Behind a space the word counts where that makes another first token of it, and no more of them.
            found |= {bare, spaced} if len(spaced) == len(bare) else {bare}
        return found - {()}

    def _stop_ids(self, model: Model) -> frozenset[int]:
        _check_ids("stop_token_ids", self.stop_token_ids or (), model)
        ends = frozenset() if self.ignore_eos else model.end_ids
        return ends | frozenset(self.stop_token_ids or ())


def _check_ids(key: str, ids: Any, model: Model) -> None:
    for token in ids:
        if not 0 <= token < model.vocab:
            raise RequestError(
                f"{key}: the token id {token} is not in the vocabulary (0 to {model.vocab - 1})"
            )
