"""The default model's tokenizer, pulled where it is not there yet."""

from __future__ import annotations

import pytest

from mpillm.catalogue.models import resolve
from mpillm.model.opening import open_source
from mpillm.text import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def smollm2() -> Tokenizer:
    source = open_source(resolve("smollm2-135m"))
    try:
        tokenizer = load_tokenizer(source.tokenizer, 49152)
    finally:
        source.close()
    assert tokenizer is not None
    return tokenizer
