"""Text while it comes: any order of any tokens gives what decoding them all at once gives; stops are found."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpillm.text import (
    IncrementalDecoder,
    StopStrings,
    StopWatch,
    Tokenizer,
    cut_at_stop,
    load_tokenizer,
    token_id_text,
)
from tests.text import vocabularies
from tests.text.strings import STRINGS


@cache
def tokenizer(kind: str) -> Tokenizer:
    made = load_tokenizer(vocabularies.ALL[kind]())
    assert made is not None
    return made


KINDS = ["qwen2", "llama", "llama-noprefix"]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(KINDS), st.lists(st.integers(0, 720)), st.booleans(), st.booleans())
def test_pieces_make_the_whole(kind: str, ids: list[int], skip: bool, start: bool) -> None:
    decoder = IncrementalDecoder(tokenizer(kind), skip_special=skip, start=start)
    pieces = [decoder.push(id) for id in ids] + [decoder.finish()]
    assert "".join(pieces) == tokenizer(kind).decode(ids, skip_special=skip, start=start)


@pytest.mark.parametrize("kind", KINDS)
def test_characters_come_whole(kind: str) -> None:
    for text in STRINGS:
        decoder = IncrementalDecoder(tokenizer(kind))
        pieces = [decoder.push(id) for id in tokenizer(kind).encode(text)]
        assert decoder.finish() == ""
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_without_their_rest_are_replaced_at_the_end() -> None:
    ids = tokenizer("qwen2").encode("a\U0001f9ff")[:-1]
    decoder = IncrementalDecoder(tokenizer("qwen2"))
    assert "".join(decoder.push(id) for id in ids) == "a"
    assert decoder.finish() == "\ufffd"


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(KINDS), st.lists(st.integers(0, 720)), st.booleans())
def test_a_text_that_is_not_final_is_what_came_so_far(kind: str, ids: list[int], start: bool) -> None:
    decoder = IncrementalDecoder(tokenizer(kind), start=start)
    assert tokenizer(kind).decode(ids, start=start, final=False) == "".join(map(decoder.push, ids))


def test_a_continuation_keeps_its_space() -> None:
    spm = tokenizer("llama")
    ids = spm.encode("brown fox", add_special=False)
    assert (spm.decode(ids), spm.decode(ids, start=False)) == ("brown fox", " brown fox")
    prompt = spm.encode("The quick")
    assert spm.decode(prompt) + spm.decode(ids, start=False) == "The quick brown fox"


def test_tokens_alone() -> None:
    spm, byte_level = tokenizer("llama"), tokenizer("qwen2")
    assert spm.token_bytes(spm.encode("\n", add_special=False)[-1]) == b"\n"
    assert spm.token_text(spm.encode("fox", add_special=False)[0])[0] == " "
    partial = byte_level.encode("\U0001f9ff")
    assert b"".join(byte_level.token_bytes(id) for id in partial) == "\U0001f9ff".encode()
    assert byte_level.token_text(partial[0]) == "\ufffd"
    assert byte_level.token_text(byte_level.encode("<|im_end|>", parse_special=True)[0]) == "<|im_end|>"
    assert byte_level.token_bytes(10**6) == b"", "models pad their vocabulary"
    assert byte_level.decode([10**6]) == ""
    assert token_id_text(17) == "token_id:17"


ALPHABET = st.text(alphabet="ab\u00e9", max_size=12)
STOPS = st.lists(st.text(alphabet="ab\u00e9", max_size=4), max_size=4)


def by_characters(text: str, stops: list[str]) -> tuple[str, bool]:
    """The definition: read character by character, stop when what was read ends with a stop string."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@settings(max_examples=500, deadline=None)
@given(st.lists(ALPHABET, max_size=6), STOPS)
def test_stop_strings_do_not_see_borders(pieces: list[str], stops: list[str]) -> None:
    stop = StopStrings(stops)
    given_out, stopped = "", False
    for piece in pieces:
        text, stopped = stop.push(piece)
        given_out += text
        if stopped:
            break
    given_out += stop.finish()
    assert (given_out, stopped) == by_characters("".join(pieces), stops)
    assert cut_at_stop("".join(pieces), stops) == by_characters("".join(pieces), stops)
    assert stop.push("more") == (("", True) if stopped else stop.push("")) or not stopped


def test_what_may_become_a_stop_is_held_back() -> None:
    stop = StopStrings(["\nUser:", "###"])
    assert stop.push("Yes.\nUs") == ("Yes.", False)
    assert stop.push("e") == ("", False)
    assert stop.push("ful #") == ("\nUseful ", False)
    assert stop.push("##x") == ("", True)
    assert stop.stopped
    assert stop.push("y") == ("", True)
    assert stop.finish() == ""


def test_a_watch_counts_tokens_and_keeps_the_text(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("Once upon a time, there was a robot. The end.")
    watch = smollm2.watch(["a rob", "end"])
    answers = [watch(id) for id in ids]
    assert True in answers
    at = answers.index(True)
    assert watch.finish() == "Once upon a time, there was "
    assert smollm2.decode(ids[: at + 1]).endswith("a robot")
    again = StopWatch(smollm2, ["nowhere"])
    assert not any(again(id) for id in ids)
    assert again.tokens == len(ids)
    assert again.finish() == smollm2.decode(ids)
