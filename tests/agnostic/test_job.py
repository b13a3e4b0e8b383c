"""A job whose requests share a system prompt: said in the report, and seen nowhere in the results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.conftest import run_bounded
from tests.e2e.jobs import command, write_lines


def test_shared_prompts_are_reported_and_change_no_result(tmp_path: Path) -> None:
    system = {"role": "system", "content": "You are a wizard. " * 12}
    lines = [
        {
            "custom_id": str(i),
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "messages": [system, {"role": "user", "content": f"Spell {i}!"}],
                "n": 2,
                "temperature": 0.9,
                "max_tokens": 5,
                "logprobs": True,
            },
        }
        for i in range(6)
    ]
    source = write_lines(tmp_path / "in.jsonl", lines)
    found = {}
    for sharing in ("true", "false"):
        output = tmp_path / sharing
        done = run_bounded([sys.executable, *command(source, output, f"batch.prefix_sharing={sharing}")])
        assert done.returncode == 0, done.stderr
        tokens = json.loads((output / "report.json").read_text())["tokens"]
        assert (" shared)" in done.stderr) is (sharing == "true")
        found[sharing] = tokens, [(output / name).read_bytes() for name in ("results.jsonl", "results.h5")]
    with_it, without = found["true"], found["false"]
    assert with_it[1] == without[1]
    assert without[0]["shared"] == 0 < with_it[0]["shared"]
    assert with_it[0]["prompt"] == without[0]["prompt"]
