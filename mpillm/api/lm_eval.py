"""A model of lm-evaluation-harness: `mpillm lm-eval` registers it, and hands its words over to the harness."""

from __future__ import annotations

import logging
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from mpillm.api.answers import Answer, Generation
from mpillm.api.llm import LLM
from mpillm.catalogue import models
from mpillm.errors import JobError, MpillmError, RequestError
from mpillm.model.opening import config_of, open_source
from mpillm.spec import MemorySection
from mpillm.text import Tokenizer, load_tokenizer

log = logging.getLogger(__name__)

MODEL = "mpillm"  # how --model names it
LINE_TOKENS = 1 << 16  # the maximum tokens of one line: all continuations, each with its context

# Cache key, ids of the context and what follows it.
Scored = tuple[tuple[str, str] | None, list[int], list[int]]


def run(words: Sequence[str]) -> int:
    """Run the harness with the words of its command line; `--model mpillm` need not be said.

    JobError says what the harness itself refuses: an unknown task, a data set that cannot be had.
    """
    named = any(word in ("--model", "-M") or word.startswith("--model=") for word in words)
    sys.argv = [
        "lm-eval",
        *words,
        *([] if named or words[:1] in ([], ["ls"], ["validate"]) else ["--model", MODEL]),
    ]
    try:
        cli_evaluate()
    except MpillmError:
        raise
    except Exception as error:
        if any(frame.filename == __file__ for frame in traceback.extract_tb(error.__traceback__)[1:]):
            raise  # it comes out of the model
        if "no model for this name found" in str(error):  # it goes on with all names that it knows
            raise JobError(
                "--model names a class of the harness; type --model_args model=NAME for a model."
            ) from error
        raise JobError(f"lm-evaluation-harness has stopped: {type(error).__name__}: {error}") from error
    return 0


@register_model(MODEL)
class HarnessLM(TemplateLM):  # type: ignore[misc]
    """A model whose log-probabilities and texts `LLM` computes, all requests of a kind as one batch.

    Texts become tokens, and answers numbers, as in the harness's `hf`. An answer is cached (`--use_cache`) when it is
    finished, so that a run that was stopped goes on from there.
    """

    def __init__(
        self,
        model: str = "",
        ranks: int = 1,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        think_end_token: str | int | None = None,
        enable_thinking: bool | None = None,
        chat_template_args: dict[str, Any] | None = None,
        batch_size: object = None,
        max_batch_size: object = None,
        device: object = None,
        **settings: Any,
    ) -> None:
        """`settings` are those of a job, dotted: `memory.kv=4GiB`, `memory.kv_type=f32`, `quantize=q8_0`.

        `max_length` is how many tokens a window has: at most one fewer than the context, for the token behind it. Batch
        sizes and devices are taken for the harness's sake: steps are filled, whatever they say.
        """
        super().__init__()
        if not model:
            raise JobError("No model is named; type --model_args model=smollm2-135m.")
        source = open_source(models.resolve(model))
        config = config_of(source)
        tokenizer = load_tokenizer(source.tokenizer, config.vocab)
        if tokenizer is None:
            raise JobError(f"The model {model} has no tokenizer, which lm-eval tasks need.")
        self._tokenizer: Tokenizer = tokenizer
        nested = _nested(settings)
        context = min(
            config.max_position, nested.get("memory", {}).get("max_context", MemorySection().max_context)
        )
        self.max_length = min(max_length or context, context - 1)
        self.max_gen_toks = max_gen_toks
        self._add_bos, self._prefix = add_bos_token, prefix_token_id
        number = isinstance(think_end_token, str) and think_end_token.isdigit()
        self._think_end = int(think_end_token) if number else think_end_token  # type: ignore[arg-type]
        thinking = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self._template_args = {**(chat_template_args or {}), **thinking}
        self._name = model
        self._llm = LLM(model, ranks, **nested)

    @property
    def eot_token_id(self) -> int | None:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        tokenizer = self._tokenizer
        for id in (self._prefix, tokenizer.bos_id, tokenizer.eos_id):
            if id is not None:
                return id
        raise JobError(
            "The model has no token that begins a text; give one as prefix_token_id in --model_args."
        )

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        name = chat_template if isinstance(chat_template, str) else "default"
        return self._tokenizer.template(name) if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        options = {
            **self._template_args,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        try:
            return self._tokenizer.render_chat(chat_history, options)
        except RequestError as error:  # for example, the template has no system role
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            log.warning("%s The chat continues without its system message.", error)
            return self._tokenizer.render_chat(rest, options)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        special = self._add_bos if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and string.startswith(self._tokenizer.token_text(self.prefix_token_id)):
            special = False  # the chat template has written the special tokens
        ids = self._tokenizer.encode(string, special is not False, parse_special=True)
        bos = self._tokenizer.bos_id
        if special and self._add_bos and bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]  # whatever the tokenizer's files say
        return ids

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows: list[Scored] = []
        texts: list[int] = []  # for each window, the number of its text
        for index, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            for context, continuation in map(make_disjoint_window, rolling):
                windows.append((None, context, continuation))
                texts.append(index)
        totals, left = [0.0] * len(requests), Counter(texts)
        for at, (logprob, _) in self._scored(windows, disable_tqdm):
            index = texts[at]
            totals[index] += logprob
            left[index] -= 1
            if not left[index]:
                self.cache_hook.add_partial("loglikelihood_rolling", requests[index].args, totals[index])
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        lines, stops = [], []
        for request in requests:
            context, asked = request.args
            body = dict(normalize_gen_kwargs(asked, self.max_gen_toks))
            until = [stop for stop in body.pop("until") if stop]
            maximum = body.pop("max_gen_toks")
            if not 0 < maximum < self.max_length:
                raise JobError(
                    f"max_gen_toks is {maximum}, and the model takes {self.max_length} tokens in all."
                )
            if not body.pop("do_sample"):
                body["temperature"] = 0.0
            ids = self.tok_encode(context)[-(self.max_length - maximum) :]
            lines.append(
                {
                    "prompt": ids,
                    "max_tokens": maximum,
                    # Where a model thinks first, a text that ends the answer may stand in its thoughts.
                    "stop": until if self._think_end is None else [],
                    "skip_special_tokens": False,  # a control token may end the answer
                    **body,
                }
            )
            stops.append(until)
        texts = [""] * len(requests)
        for answer in self._answers(lines, "texts", disable_tqdm):
            assert isinstance(answer, Generation)
            text = self._said(answer.completions[0].tokens.tolist(), stops[answer.index])
            texts[answer.index] = text
            self.cache_hook.add_partial("generate_until", requests[answer.index].args, text)
        return texts

    def _said(self, tokens: list[int], stops: list[str]) -> str:
        """Return the text of an answer behind what was thought, up to one of the `stops`."""
        end = self._think_end
        if not isinstance(end, int):
            return str(postprocess_generated_text(self._tokenizer.decode(tokens), stops, end))
        if end in tokens:
            tokens = tokens[len(tokens) - tokens[::-1].index(end) :]
        return str(postprocess_generated_text(self._tokenizer.decode(tokens).lstrip(), stops, None))

    def _loglikelihood_tokens(
        self, requests: list[Scored], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        found = [(0.0, False)] * len(requests)
        for index, scored in self._scored(requests, disable_tqdm):
            found[index] = scored
            if (key := requests[index][0]) is not None:
                self.cache_hook.add_partial("loglikelihood", key, scored)
        return found

    def _scored(self, requests: list[Scored], quiet: bool) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Yield each request's index, log-likelihood, and whether its tokens are the likeliest, when it is finished."""
        groups = list(self._grouped(requests))
        lines = [
            {"prompt": context, "choices": continuations, "is_greedy": True}
            for _, context, continuations in groups
        ]
        for answer in self._answers(lines, "continuations", quiet):
            first = groups[answer.index][0]
            for choice in answer.body["choices"]:
                yield first + choice["index"], (choice["logprob"], choice["is_greedy"])

    def _grouped(self, requests: list[Scored]) -> Iterator[tuple[int, list[int], list[list[int]]]]:
        """Neighbours with the same context, which is computed once: the index of the first, and their tokens."""
        for context, group in groupby(enumerate(requests), lambda item: self._context(item[1])):
            first, tokens = -1, 0
            held: list[list[int]] = []
            for index, (_, _, continuation) in group:
                more = len(context) + len(continuation)
                if held and tokens + more > LINE_TOKENS:
                    yield first, context, held
                    held, tokens = [], 0
                first = first if held else index
                held.append(continuation)
                tokens += more
            yield first, context, held

    def _context(self, request: Scored) -> list[int]:
        """Return the last tokens of a request's context, as many as a window has room for."""
        _, context, continuation = request
        return context[-max(self.max_length + 1 - len(continuation), 1) :]

    def _answers(self, lines: Sequence[dict[str, Any]], what: str, quiet: bool) -> Iterator[Answer]:
        """Yield the answers as they are finished; RequestError for the first that there is none of."""
        shown = tqdm(self._llm.stream(lines), f"mpillm: {what}", len(lines), disable=quiet)
        for answer in shown:
            if answer.error is not None:
                raise RequestError(answer.error)
            yield answer


def _nested(settings: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys as tables: `memory.kv` as `{"memory": {"kv": ...}}`."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        table, _, name = key.rpartition(".")
        (found.setdefault(table, {}) if table else found)[name] = value
    return found
