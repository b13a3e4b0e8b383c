"""A model of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), called "mpillm".

Importing this module registers it. `mpillm lm-eval` is the harness's command line with it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from mpillm import spec
from mpillm.api.answers import Answer
from mpillm.api.llm import LLM
from mpillm.errors import JobError
from mpillm.model.opening import config_of, open_source
from mpillm.run import catalogue
from mpillm.text import load_tokenizer

CHOICES = 64  # continuations of one context that are one request

Scored = tuple[tuple[str, str] | None, list[int], list[int]]  # texts (to cache by), context, continuation


@register_model("mpillm")
class HarnessModel(TemplateLM):  # type: ignore[misc]
    """All requests of one kind are one batch: those with the same context are one request, long ones come first."""

    def __init__(
        self,
        model: str,
        ranks: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: object = None,
        max_batch_size: object = None,
        device: object = None,
        **settings: Any,
    ) -> None:
        """`settings` are keys of a job by their last words, such as `quantize` or `max_context`.

        `max_length` is the most tokens that a prediction sees; by default one less than `max_context` and the model
        allow. `batch_size`, `max_batch_size` and `device`, which the harness passes, have no meaning here.
        """
        super().__init__()
        source = open_source(catalogue.resolve(model))
        config = config_of(source)
        text = load_tokenizer(source.tokenizer, config.vocab)
        if text is None:
            raise JobError(f"The model {model} has no tokenizer.")
        tables = _tables(settings)
        context = tables.get("memory", {}).get("max_context", spec.Memory().max_context)
        self.max_length = max_length or min(context, config.max_position) - 1
        self.max_gen_toks = max_gen_toks
        self._text, self._eos_ids = text, config.eos_ids
        self._llm = LLM(model, ranks, **tables)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._text.eos_id if self._text.eos_id is not None else self._eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: BOS, or the token that ends a text."""
        return self._text.bos_id if self._text.bos_id is not None else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """The model's name, by which the harness caches rendered requests."""
        return self._llm.model

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; by default with BOS as the model wants it, unless the text begins with it."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._text.token_text(self.prefix_token_id))
        return self._text.encode(string, add_special_tokens, parse_special=True)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The chat as one text."""
        options = {"add_generation_prompt": add_generation_prompt}
        if not add_generation_prompt:
            options["continue_final_message"] = True
        return self._text.render_chat(chat_history, options)

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        by_context: dict[tuple[int, ...], list[list[int]]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            kept = max(self.max_length + 1 - len(continuation), 1)
            groups = by_context.setdefault(tuple(context[-kept:]), [[]])
            if len(groups[-1]) == CHOICES:
                groups.append([])
            groups[-1].append(index)
        groups_of = [(context, group) for context, groups in by_context.items() for group in groups]
        lines = [
            _line("/v1/multiple_choice", prompt=context, choices=[requests[at][2] for at in group], is_greedy=True)
            for context, group in groups_of
        ]  # fmt: skip
        found: dict[int, tuple[float, bool]] = {}
        for answer in self._answers(lines, "loglikelihood", disable_tqdm):
            for at, choice in zip(groups_of[answer.index][1], answer.body["choices"], strict=True):
                found[at] = choice["logprob"], choice["is_greedy"]
                if (texts := requests[at][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, found[at])
        return [found[at] for at in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text as a whole, in windows of `max_length` tokens."""
        windows: list[Scored] = []
        begins = [0]
        for request in requests:
            pairs = utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            windows += [(None, *utils.make_disjoint_window(pair)) for pair in pairs]
            begins.append(len(windows))
        scores = self._loglikelihood_tokens(windows, disable_tqdm)
        found = []
        for index, request in enumerate(requests):
            found.append(sum(score for score, _ in scores[begins[index] : begins[index + 1]]))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, up to one of the request's `until`."""
        lines = [self._generation(*request.args) for request in requests]
        found: dict[int, str] = {}
        for answer in self._answers(lines, "generate_until", disable_tqdm):
            found[answer.index] = answer.body["choices"][0]["text"]
            self.cache_hook.add_partial("generate_until", requests[answer.index].args, found[answer.index])
        return [found[at] for at in range(len(requests))]

    def _generation(self, context: str, asked: dict[str, Any]) -> dict[str, Any]:
        options = dict(normalize_gen_kwargs(asked, self.max_gen_toks))
        until, count = options.pop("until", None) or [], options.pop("max_gen_toks")
        options.pop("do_sample", None)
        prompt = self.tok_encode(context)[-max(self.max_length + 1 - count, 1) :]
        stop = [until] if isinstance(until, str) else until
        return _line("/v1/completions", prompt=prompt, max_tokens=count, stop=stop, **options)

    def _answers(self, lines: list[dict[str, Any]], what: str, disable_tqdm: bool) -> Iterator[Answer]:
        """The answers, each when it is finished; RequestError if a request is wrong."""
        for answer in tqdm(self._llm.stream(lines), what, len(lines), disable=disable_tqdm):
            answer.check()
            yield answer


def _line(url: str, **body: Any) -> dict[str, Any]:
    return {"method": "POST", "url": url, "body": body}


def _tables(settings: dict[str, Any]) -> dict[str, Any]:
    """The tables of a job; `settings` have the last words of its keys."""
    tables: dict[str, Any] = {}
    for name, value in settings.items():
        key = spec.key_called(name)
        if key is None:
            raise JobError(f"--model_args: there is no key {name!r} in a job.")
        section, _, last = key.rpartition(".")
        (tables.setdefault(section, {}) if section else tables)[last] = value
    return tables


def main(words: Sequence[str]) -> int:
    """The harness's command line; `--model mpillm` goes without saying."""
    from lm_eval.__main__ import cli_evaluate

    own = words[:1] in (["ls"], ["validate"]) or "--model" in words
    sys.argv = ["lm-eval", *([] if own else ["run", "--model", "mpillm"]), *words]
    cli_evaluate()
    return 0
