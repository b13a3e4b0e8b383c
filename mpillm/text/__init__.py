"""Text in and out of token ids: tokenizers, chat templates, incremental decoding, stop strings."""

from mpillm.text.bounds import TooLongError
from mpillm.text.decode import IncrementalDecoder, StopStrings, StopWatch, cut_at_stop
from mpillm.text.tokenizer import Tokenizer, load_tokenizer, token_id_text

__all__ = [
    "IncrementalDecoder",
    "StopStrings",
    "StopWatch",
    "Tokenizer",
    "TooLongError",
    "cut_at_stop",
    "load_tokenizer",
    "token_id_text",
]
