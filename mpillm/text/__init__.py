"""Text in and out of token ids: tokenizers, chat templates, incremental decoding, stop strings."""

from .bounds import TooLongError
from .decode import IncrementalDecoder, StopStrings, StopWatch, cut_at_stop
from .tokenizer import Tokenizer, load_tokenizer, token_id_text

__all__ = [
    "IncrementalDecoder",
    "StopStrings",
    "StopWatch",
    "TooLongError",
    "Tokenizer",
    "cut_at_stop",
    "load_tokenizer",
    "token_id_text",
]
