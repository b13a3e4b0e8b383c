"""What an input asks for, and what rank 0 keeps of it: before a run, by its lines."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pyarrow
import pytest
from pyarrow import parquet

from mpillm import spec
from mpillm.batch.endpoints.prompts import MAX_ANSWER
from mpillm.kernels import KV_BLOCK
from mpillm.planning.answer_length import UNKNOWN, decisions, longest_match
from mpillm.planning.grammar_memory import HELD, REMAINDER, WORD, compiled_bytes
from mpillm.planning.input_memory import (
    ARROW,
    CHARACTER,
    CHAT,
    LOGPROB,
    NAMES,
    PROMPT,
    READ,
    TABLE,
    TEMPLATE,
    TOKEN_ID,
    WRITE,
    checking_bytes,
    input_needs,
)
from mpillm.planning.input_needs import COPIES, WRITTEN, InputNeeds, line_bytes
from mpillm.planning.limits import CacheCapacity, StepSize
from mpillm.planning.token_count import Around
from mpillm.store.table import BYTES
from mpillm.text.bounds import CHUNK
from mpillm.text.constrain import CACHED

EACH = line_bytes(1) + WRITTEN
ASKED = [
    ("", 0),
    ("a", EACH),
    (f'{{"custom_id": "{"n" * 500}", "max_tokens": 0}}', EACH + NAMES * sys.getsizeof("n" * 500)),
    ('{"prompt": "a", "max_tokens": 0}\nb', 2 * EACH + 7 * PROMPT),
    ('{"prompt": "a"}\n\n{"prompt": 5}\n', 3 * EACH + COPIES * 8 * 128 + 2 * (72 * 128 + 7 * PROMPT)),
    ('{"input": ["a", [5]]}', EACH + COPIES * 2 * 64 * 22 + 2 * (4 * 64 + 7 * PROMPT)),
    ('{"body": {"prompt": "a", "max_tokens": 9, "n": 3, "logprobs": 2}}',
     EACH + COPIES * 3 * 9 * (8 + 3 * 80) + 3 * 9 * (72 + 3 * LOGPROB) + 3 * 7 * PROMPT),
    ('{"messages": [], "max_tokens": 100, "n": 1000, "logprobs": true, "top_logprobs": 20}',
     EACH + COPIES * MAX_ANSWER + 1000 * 100 * (72 + 21 * LOGPROB) + 1000 * 18 * PROMPT + TEMPLATE + 84 * CHAT),
]  # fmt: skip


@pytest.mark.parametrize(("text", "nbytes"), ASKED)
def test_what_is_kept_of_an_input(text: str, nbytes: int, tmp_path: Path) -> None:
    """Lines, the longest answer, and what the choices of unfinished lines take."""
    job = spec.load(None, input=str(tmp_path / "in.jsonl"), output=str(tmp_path / "out"))
    assert input_needs(job, 64).kept(4, 100) == 0
    (tmp_path / "in.jsonl").write_text(text)
    assert input_needs(job, 64).kept(4, 100) == nbytes
    table = spec.load(None, ["output.format=parquet"], input=job.input, output=job.output.path)
    assert 0 <= input_needs(table, 64).kept(4, 100) - nbytes - ARROW - TABLE <= WRITE * BYTES


def test_what_is_read_of_parquet(tmp_path: Path) -> None:
    """A page of a column at once, and no more than it has."""
    for count, size in ((10, 50), (3000, 20_000)):
        path = tmp_path / "in.parquet"
        texts = [random.Random(number).randbytes(size // 2).hex() for number in range(count)]
        parquet.write_table(pyarrow.table({"prompt": texts}), path, use_dictionary=False)
        job = spec.load(None, ['request.prompt="{prompt}"'], input=str(path), output=str(tmp_path / "out"))
        reading = input_needs(job, 64).reading - ARROW
        assert reading == pytest.approx(READ * size * min(count, 1024), rel=0.5)


def test_grammars_are_planned_where_there_are_any(tmp_path: Path) -> None:
    """Those that are told apart, each with what is kept of it; not tools that may be called, nor a format of text."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}

    def needed(*bodies: dict[str, object], **sampling: object) -> int:
        job = spec.load(
            None,
            [f"sampling.{key}={value}" for key, value in sampling.items()],
            input=str(tmp_path / "in.jsonl"),
            output=str(tmp_path / "out"),
        )
        lines = (json.dumps({"prompt": "a", "max_tokens": 1, **body}) + "\n" for body in bodies)
        (tmp_path / "in.jsonl").write_text("".join(lines))
        return input_needs(job, 64).grammars.kept(4, 100)

    assert needed({}, {"response_format": {"type": "text"}}, {"guided_json": None}, {"tools": [tool]}) == 0
    one = needed({"guided_regex": "a"})
    assert one > HELD + 100 * WORD, "and what is known of a vocabulary of 100 tokens"
    assert needed({"guided_regex": "a"}, {"guided_regex": "a"}) == one
    assert needed({}, structured_outputs='{regex="a"}') >= one
    assert needed({"tools": [tool], "tool_choice": "required"}) > one
    many = [
        needed(*({"guided_regex": f"{n:03}"} for n in range(count))) for count in (CACHED, CACHED + 4, 99)
    ]
    assert one + HELD < many[0] < many[1] == many[2]
    assert needed({"guided_json": {"type": "integer", "multipleOf": 29989}}) > one + 29989 * REMAINDER


def test_a_grammar_is_planned_by_its_length_its_counts_and_its_divisors() -> None:
    """As measured with llguidance 1.9: 62,000 bytes of 4 choices, 15 MiB of a divisor, 3 MiB of a counted text."""
    assert 62_000 < compiled_bytes(b'["the quick","brown fox","jumps over","a lazy"]') < 100_000
    assert 15 * 2**20 < compiled_bytes(b'{"type": "integer", "multipleOf": 0.29989}') < 16 * 2**20
    assert 3 * 2**20 < compiled_bytes(b'{"type": "string", "maxLength": 5000}') < 7 * 2**20


@pytest.mark.parametrize(
    ("pattern", "length"),
    [
        ("[0-9]{4}-[0-9]{2}", 7),
        ("(a|bcd){2,3}x?", 10),
        (r"\d\*[*+]", 3),
        ("((ab){2}|c)d", 5),
        ("a+", UNKNOWN),
        ("(a|b*)", UNKNOWN),
        ("a{2,}", UNKNOWN),
        ("a{,3}", UNKNOWN),
        (r"\p{L}", UNKNOWN),
        ("a{999999999}{999999999}{999999999}", UNKNOWN),
    ],
)
def test_the_longest_match_of_a_regular_expression(pattern: str, length: int) -> None:
    assert longest_match(pattern) == length


SCORED = '{"query": "a", "documents": ["b"]}'


@pytest.mark.parametrize(
    ("text", "sequences", "prompt", "generated", "blocks"),
    [
        ('{"prompt": [5, 6, 7], "max_tokens": 61}', 1, 3, 61, 1),
        ('{"prompt": [[5, 6], [7]], "n": 2, "max_tokens": 0}', 4, 3, 0, 0),
        ('{"prompt": "abcdef", "max_tokens": 10}', 1, 2, 10, 0),
        ('{"messages": [{"role": "user", "content": "a"}], "max_tokens": 0}', 1, 13, 0, 0),
        ('{"input": ["a", "b"]}', 2, 1, 0, 0),
        ('{"prompt": "a", "max_tokens": 9000}\n' * 2, 2, 2, 2 * 4096, 2 * 128),
        (f'{{"prompt": "a", "max_tokens": 1}}\n{SCORED}', 2, 1, 1 + 128, None),
        ('{"prompt": "a", "max_tokens": 9, "guided_choice": ["yes", "no"]}', 1, 1, 9, 0),
        ('{"prompt": "a", "max_tokens": 9, "guided_regex": "[a-z]{3}"}', 1, 1, 3, 0),
        ('{"prompt": "a", "choices": ["b", "c"]}', 2, 2, 0, 0),
    ],
)
def test_what_an_input_asks_for(
    text: str, sequences: int, prompt: int, generated: int, blocks: int | None, tmp_path: Path
) -> None:
    """Tokens of lists are counted, those of texts are at most their bytes; what is not known bounds nothing."""
    job = spec.load(None, input=str(tmp_path / "in.jsonl"), output=str(tmp_path / "out"))
    (tmp_path / "in.jsonl").write_text(text)
    asked = input_needs(job, 64, Around(40))
    assert (asked.sequences, asked.prompt_tokens, asked.generated_tokens, asked.blocks) == (
        sequences, prompt, generated, blocks,
    )  # fmt: skip


def test_the_cache_is_planned_for_what_the_input_can_need() -> None:
    capacity = CacheCapacity(blocks=100, blocks_in_memory=100, slots=10, saved=2)
    step = StepSize(4, 10)
    assert capacity.needed(2, InputNeeds(lines=1, sequences=3, blocks=20), step, 2) == (46, 5)
    assert capacity.needed(2, InputNeeds(lines=1, sequences=30, blocks=20), step, 2) == (56, 12)
    short = InputNeeds(lines=1, sequences=30, blocks=20, lengths=((8, 30),), longest_answer=2)
    assert capacity.needed(2, short, step, 2) == (50, 12), (
        "4 of 8 tokens begin in 2 steps, 1 goes on; each takes 2"
    )
    assert capacity.needed(2, InputNeeds(lines=1, sequences=30, blocks=90), step, 2) == (100, 12)
    for nothing in (InputNeeds(), InputNeeds(lines=1, blocks=None)):
        assert capacity.needed(2, nothing, step, 2) == (100, 12)
    assert replace(short, tokens=20 * KV_BLOCK).fill(50, 2, 8, 20)
    assert not replace(short, tokens=21 * KV_BLOCK).fill(50, 2, 8, 20), "where nothing is shared"


def test_a_part_of_the_lines_needs_the_blocks_of_those_that_need_most() -> None:
    capacity, step = CacheCapacity(blocks=1000, blocks_in_memory=1000, slots=100, saved=0), StepSize(64, 512)
    asked = InputNeeds(lines=5, sequences=10, largest=2, blocks=26, blocks_of_lines=((9, 2), (3, 1), (1, 5)))
    needed = [capacity.needed(1, asked, step, 1, part) for part in (0.0, 0.2, 0.4, 0.6, 1.0)]
    assert needed == [(0, 1), (9 + 2, 2), (18 + 4, 4), (21 + 6, 6), (26 + 10, 10)]
    assert capacity.needed(1, asked, step, 1, 0.5) == needed[3], "two or three of five lines"


@pytest.mark.parametrize("ids", [False, True])
def test_blocks_that_prompts_have_in_common_are_counted_once(ids: bool, tmp_path: Path) -> None:
    """Each computes its last token, and runs beside others as it computes little else."""
    job = spec.load(None, input=str(tmp_path / "in.jsonl"), output=str(tmp_path / "out"))

    def needs(*prompts: str) -> InputNeeds:
        bodies = [{"prompt": list(text.encode()) if ids else text, "max_tokens": 1} for text in prompts]
        (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, bodies)))
        return input_needs(job, 64, load=Bytes)  # type: ignore[arg-type, unused-ignore]

    common = "a" * 2 * KV_BLOCK
    asked = needs(common, common + "b", common + "c" * KV_BLOCK, "d" * 5)
    assert (asked.blocks, asked.blocks_of_lines) == (2 + 0 + 1 + 0, ((2, 1), (1, 1), (0, 2)))
    assert asked.lengths == ((1, 1), (5, 1), (KV_BLOCK, 1), (2 * KV_BLOCK, 1))
    assert needs(common, common).blocks_of_lines == ((2, 1), (1, 1)), "the second computes its last block too"
    assert needs(common, common).prompt_tokens == 4 * KV_BLOCK


def test_sequences_that_run_leave_less_room_for_others() -> None:
    asked = InputNeeds(lines=99, sequences=99, blocks=0, lengths=((10, 99),), longest_answer=3)
    at_once = [replace(asked, longest_answer=steps).at_once(64, 50) for steps in (0, 1, 2, 3, 99)]
    assert at_once == [6, 6, 10, 14, 50], "a row each is left for those that run"
    few_short = replace(asked, lengths=((5, 4), (40, 95)))
    assert few_short.at_once(64, 50) == 7 == 4 + 2 + 1, "the shortest first, and one that goes on later"
    assert replace(asked, lengths=()).at_once(64, 50) == 64, "of any length"


def test_states_are_saved_only_where_prompts_may_begin_alike(tmp_path: Path) -> None:
    job = spec.load(None, input=str(tmp_path / "in.jsonl"), output=str(tmp_path / "out"))
    long, other = ([number, *range(40)] for number in (1, 2))

    def alike(*bodies: dict[str, object]) -> int:
        (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, bodies)))
        return input_needs(job, 64, load=Bytes).alike  # type: ignore[arg-type, unused-ignore]

    assert alike({"prompt": long}, {"prompt": other}, {"prompt": [[5, 6], [5, 6]]}) == 0
    assert alike({"prompt": long}, {"prompt": [other, long]}, {"prompt": other, "n": 3}) == 4
    assert alike({"prompt": "a" * 40}, {"prompt": ["b" * 40, "a" * 50]}, {"prompt": "a"}) == 1
    assert alike({"messages": [{"role": "user", "content": "a"}]}) == 1, "a template may begin all alike"
    capacity = CacheCapacity(blocks=100, blocks_in_memory=100, slots=10, saved=4)
    for sequences, found in ((0, 3), (1, 4), (9, 7)):
        asked = InputNeeds(lines=1, sequences=3, blocks=20, alike=sequences)
        assert capacity.needed(2, asked, StepSize(4, 10), 2)[1] == found


def test_logits_are_planned_twice_where_they_are_changed(tmp_path: Path) -> None:
    job = spec.load(None, input=str(tmp_path / "in.jsonl"), output=str(tmp_path / "out"))
    (tmp_path / "in.jsonl").write_text('{"prompt": [5], "max_tokens": 1}\n')
    assert not input_needs(job, 64).adjusts
    warm = msgspec.structs.replace(job.sampling, presence_penalty=0.5)
    assert input_needs(msgspec.structs.replace(job, sampling=warm), 64).adjusts
    for key in ("logit_bias", "repetition_penalty", "guided_regex", "min_tokens"):
        (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": [5], key: 1}))
        assert input_needs(job, 64).adjusts, key
    assert InputNeeds().adjusts


def test_rows_and_logits_are_planned_for_what_the_input_can_ask_for() -> None:
    asked = InputNeeds(lines=3, sequences=3, blocks=6, prompts=50, tokens=77, longest_answer=9)
    assert asked.rows(held=True, drafted=0) == 53
    assert asked.rows(held=False, drafted=0) == 77, "a sequence may be computed again with its answer"
    assert (asked.outputs(64, 512, 0, 1), asked.outputs(64, 512, 15, 1), asked.outputs(64, 5, 15, 1)) == (
        3,
        48,
        5,
    )
    assert asked.outputs(64, 512, 15, 2) == 2 * 16, "each of two micro-batches has half of the sequences"
    assert replace(asked, scores=True).outputs(64, 512, 0, 2) == 512
    assert InputNeeds().outputs(64, 512, 0, 1) == 512


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ('{"input": [[5, 6, 7], [8, 9]]}', ((2, 1), (3, 1))),
        ('{"input": [[5, 6], [8, 9]], "n": 2}\n{"prompt": [[5, 6, 7], [8, 9]], "n": 2}', ((1, 4), (2, 2))),
        ('{"input": ["a b c d", "e f g h"]}', ((1, 2),)),
    ],
)
def test_prompts_of_a_line_are_as_long_as_its_lists(
    text: str, lengths: tuple[tuple[int, int], ...], tmp_path: Path
) -> None:
    job = spec.load(None, input=str(tmp_path / "in.jsonl"), output=str(tmp_path / "out"))
    (tmp_path / "in.jsonl").write_text(text)
    assert input_needs(job, 64).lengths == lengths


@pytest.mark.parametrize(
    ("texts", "count"),
    [
        (["yes", "no", "maybe"], 1),
        (["yes"], 1),
        (["a", "ab", "abc", "b"], 3),
        (["aab", "aac", "abx", "b", "b"], 3),
    ],
)
def test_decisions_on_the_way_to_a_choice(texts: list[str], count: int) -> None:
    assert decisions(texts) == count


class Bytes:
    """A tokenizer with a token for each byte."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


@pytest.mark.parametrize(
    ("lines", "settings", "blocks"),
    [
        (['{"prompt": "%s", "max_tokens": 1}' % ("a" * 100)] * 9, [], 3),
        (['{"prompt": "%s", "max_tokens": 1}' % ("a" * 100)] * 9, ["batch.prefix_sharing=false"], 27),
        (['{"prompt": "%s", "max_tokens": 40, "n": 5}' % ("a" * 100)], [], 3 + 5),
        (['{"prompt": "%s", "choices": ["yes", "no"]}' % ("a" * 100)] * 2, [], 3),
        (['{"prompt": "a", "max_tokens": 99, "guided_choice": ["%s", "no"]}' % ("b" * 64)], [], 2),
    ],
)
def test_blocks_that_are_shared_are_planned_once(
    lines: list[str], settings: list[str], blocks: int, tmp_path: Path
) -> None:
    job = spec.load(None, settings, input=str(tmp_path / "in.jsonl"), output=str(tmp_path / "out"))
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    assert input_needs(job, 64, load=Bytes).blocks == blocks  # type: ignore[arg-type, unused-ignore]


@pytest.mark.parametrize("text", ["a" * 100, [5] * 100])
def test_models_that_read_whole_prompts_share_no_blocks(text: object, tmp_path: Path) -> None:
    job = spec.load(None, input=str(tmp_path / "in.jsonl"), output=str(tmp_path / "out"))
    (tmp_path / "in.jsonl").write_text(9 * (json.dumps({"input": text}) + "\n"))
    for whole, blocks in ((False, 3), (True, 27)):
        asked = input_needs(job, 64, load=Bytes, whole_prompts=whole)  # type: ignore[arg-type, unused-ignore]
        assert asked.blocks == blocks


def test_chats_that_begin_alike_share_the_beginning_of_the_template(tmp_path: Path) -> None:
    """How long it is, is not known; what follows the common texts has a few tokens of the template too."""
    job = spec.load(
        None, ["sampling.max_tokens=9"], input=str(tmp_path / "in.jsonl"), output=str(tmp_path / "out")
    )

    def blocks(*texts: str) -> int | None:
        lines = [json.dumps({"messages": [{"role": "user", "content": text}]}) for text in texts]
        (tmp_path / "in.jsonl").write_text("\n".join(lines))
        asked = input_needs(job, 64, Around(template=1200), Bytes)  # type: ignore[arg-type, unused-ignore]
        return asked.blocks

    text = "a" * 100  # 212 tokens: 4 of the role, 100 of the template before and 8 of the message
    assert blocks(text) == 6
    assert blocks(*[text] * 9) == 6
    assert blocks(*(text + letter * 30 for letter in "bcdef")) == 7 + 4  # 250 tokens, 196 in common
    assert blocks(*(letter + text for letter in "bcdef")) == 5 * 6


@pytest.mark.parametrize(
    ("line", "sequences", "tokens"),
    [
        ('{"query": "ab", "documents": ["cde", {"text": "fg"}, "h"]}', 4, 8),
        ('{"text_1": "ab", "text_2": "cde"}', 2, 5),
        ('{"queries": ["ab", "c"], "items": ["d", "efg"]}', 4, 7),
        ('{"body": {"data_1": "ab", "data_2": ["c", "d"]}}', 3, 4),
    ],
)
def test_texts_of_pairs_are_counted_where_they_are_read_apart(
    line: str, sequences: int, tokens: int, tmp_path: Path
) -> None:
    job = spec.load(None, input=str(tmp_path / "in.jsonl"), output=str(tmp_path / "out"))
    (tmp_path / "in.jsonl").write_text(line)
    asked = input_needs(job, 64, Around(apart=True), Bytes)  # type: ignore[arg-type, unused-ignore]
    assert (asked.sequences, asked.prompt_tokens, asked.tokens, asked.generated_tokens) == (
        sequences, tokens, tokens, 0,
    )  # fmt: skip
    assert asked.blocks == 0
    assert input_needs(job, 64, load=Bytes).blocks is None  # type: ignore[arg-type, unused-ignore]


def test_only_texts_are_tokenized_while_a_line_is_checked() -> None:
    """A prompt of 12,000 ids takes a fifth at most of what a text of as many bytes may take."""
    ids = json.dumps({"prompt": [1000 + n for n in range(12_000)], "user": "a"}).encode()
    text = json.dumps({"prompt": ("1000, " * 12_000)}).encode()
    of_ids, of_text = checking_bytes(ids, 12_288), checking_bytes(text, 12_288)
    assert 12_000 * TOKEN_ID < of_ids < of_text / 5
    assert of_text > CHARACTER * CHUNK
    escaped = ids.replace(b'"a"', b'"\\""')
    assert checking_bytes(escaped, 12_288) > CHARACTER * CHUNK, "where a text ends is not looked for"
    assert checking_bytes(b'{"prompt": [1, 2]}', 12_288) == 0
