"""llama.cpp in a process of its own, told what to do in JSON lines on stdin: `python -m mpillm.bench.llama_child`.

Only the low-level functions of llama-cpp-python are used, with llama.cpp's own defaults but for threads and sizes.
Each command is answered by one line on stdout: a list of seconds, or {"error": sentence}.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

UBATCH = 512  # llama.cpp's default: rows computed at once


class LoadedModel:
    """A loaded model; a context is made for each command."""

    def __init__(self, path: str, threads: int) -> None:
        self._api: Any = importlib.import_module("llama_cpp.llama_cpp")
        self._quiet = self._api.llama_log_callback(lambda level, text, data: None)
        self._api.llama_log_set(self._quiet, None)
        self._api.llama_backend_init()
        self._path, self._threads = path, threads
        self._model = self._load()
        self._vocab = self._api.llama_vocab_n_tokens(self._api.llama_model_get_vocab(self._model))

    def run(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[float]:
        """Return seconds of the prompts together, then of each of `tokens` - 1 greedy steps of all sequences."""
        return self._run(self._model, prompts, tokens)

    def start(self, prompt: Sequence[int]) -> list[float]:
        """Return seconds from opening the model (once more) to the first token."""
        self._api.llama_model_free(self._model)
        start = time.perf_counter()
        self._model = self._load()
        self._run(self._model, [prompt], 1)
        return [time.perf_counter() - start]

    def _load(self) -> Any:
        params = self._api.llama_model_default_params()
        model = self._api.llama_model_load_from_file(self._path.encode(), params)
        if not model:
            raise ValueError(f"llama.cpp cannot load {self._path}")
        return model

    def _run(self, model: Any, prompts: Sequence[Sequence[int]], tokens: int) -> list[float]:
        api = self._api
        count, rows = len(prompts), sum(map(len, prompts))
        params = api.llama_context_default_params()
        params.n_threads = params.n_threads_batch = self._threads
        params.n_seq_max = count
        params.n_ctx = count * -(-max(len(prompt) + tokens for prompt in prompts) // 256) * 256
        params.n_batch, params.n_ubatch = max(rows, UBATCH), UBATCH
        context = api.llama_init_from_model(model, params)
        if not context:
            raise ValueError(f"llama.cpp cannot make a context of {params.n_ctx} tokens")
        batch = api.llama_batch_init(rows, 0, 1)
        seconds = []
        try:
            start = time.perf_counter()
            parts = [(i, start, prompt) for i, prompt in enumerate(prompts) for start in (0,)]
            following = self._decode(context, batch, parts)
            seconds.append(time.perf_counter() - start)
            for step in range(1, tokens):
                start = time.perf_counter()
                parts = [(i, len(prompts[i]) + step - 1, [token]) for i, token in enumerate(following)]
                following = self._decode(context, batch, parts)
                seconds.append(time.perf_counter() - start)
        finally:
            api.llama_batch_free(batch)
            api.llama_free(context)
        return seconds

    def _decode(self, context: Any, batch: Any, parts: Sequence[tuple[int, int, Sequence[int]]]) -> list[int]:
        """Return the likeliest next token after each part (sequence, its first position, tokens)."""
        row, ends = 0, []
        for sequence, start, tokens in parts:
            for position, token in enumerate(tokens, start):
                batch.token[row], batch.pos[row] = token, position
                batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
                batch.logits[row] = 0
                row += 1
            batch.logits[row - 1] = 1
            ends.append(row - 1)
        batch.n_tokens = row
        code = self._api.llama_decode(context, batch)
        if code:
            raise ValueError(f"llama_decode returned {code}")
        logits = (self._api.llama_get_logits_ith(context, end) for end in ends)
        return [int(np.ctypeslib.as_array(pointer, (self._vocab,)).argmax()) for pointer in logits]


def main() -> None:
    """Execute commands until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that no library writes between the answers
    llama: LoadedModel | None = None
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if "path" in command:
                with contextlib.suppress(OSError):  # mpiexec may have bound the parent to one core
                    os.sched_setaffinity(0, command["cores"])
                llama = LoadedModel(command["path"], command["threads"])
                answer: Any = []
            elif "start" in command:
                assert llama is not None
                answer = llama.start(command["start"])
            else:
                assert llama is not None
                answer = llama.run(command["prompts"], command["tokens"])
        except (ImportError, OSError, ValueError) as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
