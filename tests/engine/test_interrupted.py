"""A signal may interrupt the engine anywhere: nothing that it hands out afterwards is left out of its totals."""

from __future__ import annotations

from contextlib import closing, suppress

import pytest

from mpillm.engine import engine as engine_module
from mpillm.engine.engine import Engine
from mpillm.engine.request import Request
from mpillm.errors import Interrupted
from mpillm.run.session import Session
from tests.model.engine_harness import _alone, spec_of
from tests.model.golden import gguf_path

MODEL = gguf_path("llama_mixed")


@pytest.mark.parametrize("calls", [1, 6, 7, 11, 24])
@pytest.mark.parametrize("speculation", ["off", "prompt-lookup"])
def test_what_is_handed_out_is_counted(calls: int, speculation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [Request(str(i), tuple(range(1, 9)) * 2, max_tokens=12 + i) for i in range(5)]
    left, plain = calls, engine_module._is_done

    def interrupted(sequence: engine_module.Sequence) -> bool:
        nonlocal left
        left -= 1
        if not left:
            raise Interrupted("a signal")
        return plain(sequence)

    monkeypatch.setattr(engine_module, "_is_done", interrupted)
    with closing(Session(_alone(), spec_of(MODEL, speculation=speculation), MODEL)) as session:
        engine = Engine(session.worker, session.channel, session.limits, session.shard_vocab)
        tokens = 0
        with suppress(Interrupted):
            for finished in engine.run(requests):
                tokens += sum(len(one.tokens) for one in finished)
        assert not left
        tokens += sum(len(partial.tokens) for _, _, partial in engine.unsaved())
        assert engine.totals.generated_tokens == tokens > 0
        assert not list(engine.unsaved())
        assert engine.totals.generated_tokens == tokens
