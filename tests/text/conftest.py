"""The default model's tokenizer, pulled where it is not there yet, and tokenizers with chat templates."""

from __future__ import annotations

import pytest

from mpillm.catalogue.models import resolve
from mpillm.model.opening import open_source
from mpillm.text import Tokenizer, load_tokenizer
from tests.text.chats import Make
from tests.text.vocabularies import write_directory


@pytest.fixture(scope="session")
def smollm2() -> Tokenizer:
    source = open_source(resolve("smollm2-135m"))
    try:
        tokenizer = load_tokenizer(source.tokenizer, 49152)
    finally:
        source.close()
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A tokenizer in a style with a chat template; made once for each."""
    made: dict[tuple[str, str], Tokenizer] = {}

    def get(template: str, style: str = "qwen2") -> Tokenizer:
        if (template, style) not in made:
            tokenizer = load_tokenizer(write_directory(tmp_path_factory.mktemp("chat"), style, template))
            assert tokenizer is not None
            made[template, style] = tokenizer
        return made[template, style]

    return get
