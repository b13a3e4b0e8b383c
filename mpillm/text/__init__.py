"""Text in and out of token ids: tokenizers, chat templates, incremental decoding, stop strings."""

from mpillm.text.bounds import End, TooLongError, encoded_at_once
from mpillm.text.decode import IncrementalDecoder, StopStrings, StopWatch, cut_at_stop
from mpillm.text.loading import load_tokenizer, token_id_text
from mpillm.text.tokenizer import Tokenizer

__all__ = [
    "End",
    "IncrementalDecoder",
    "StopStrings",
    "StopWatch",
    "Tokenizer",
    "TooLongError",
    "cut_at_stop",
    "encoded_at_once",
    "load_tokenizer",
    "token_id_text",
]
