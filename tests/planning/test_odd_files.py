"""Models whose small files are no text, no JSON, or nested: a sentence, whoever reads them first."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from mpillm.cli import main
from mpillm.errors import MpillmError
from mpillm.model.opening import open_source
from mpillm.text import load_tokenizer
from tests.weights.stored import MODELS

ODD = {
    "not UTF-8": b'{"a": "\x91"}',
    "no text": bytes(range(256)) * 4,
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "nested": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "cut": b'{"a": {"b": [1, 2',
    "empty": b"",
    "a list": b'[{"chat_template": 3}]',
    "other types": b'{"chat_template": 3, "model_type": [], "architectures": {"a": 1}, "added_tokens": 5}',
    "surrogates": b'{"chat_template": "\\ud800", "architectures": ["\\udfff"], "model_type": "\\ud800"}',
    "numbers": b'{"vocab_size": 1e400, "hidden_size": -1, "num_hidden_layers": 1' + b"0" * 5000 + b"}",
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_small_file_that_is_odd_is_a_sentence(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = MODELS[kind](tmp_path / "model")
    folder = tmp_path / "model"
    small = [file for file in folder.rglob("*") if file.suffix in (".json", ".jinja", ".t")]
    for file in small:
        content = file.read_bytes()
        for what, odd in ODD.items():
            file.write_bytes(odd)
            with contextlib.suppress(MpillmError):
                load_tokenizer(open_source(model).tokenizer)
            code = main(["plan", "--model", str(model)])
            said = capsys.readouterr().err
            assert code in (0, 2), (file.name, what, said)
            assert "bug" not in said, (file.name, what, said)
            assert code == 0 or said.count("\n") == 1, (file.name, what, said)
        file.write_bytes(content)
