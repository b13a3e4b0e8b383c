"""Make the fixtures and goldens of these tests: python -m tests.text.make_goldens [fixtures] [llamacpp] [transformers]

`fixtures` trains a byte-level BPE and a SentencePiece BPE vocabulary (needs sentencepiece), `llamacpp` asks llama.cpp
for the ids of all strings under all kinds of GGUF tokenizers (needs xllamacpp), and `transformers` renders and encodes
chats (needs transformers). What they write is committed, so tests need none of them.
"""

from __future__ import annotations

import json
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

from tests.text import chats, vocabularies
from tests.text.digests import digest
from tests.text.strings import PROSE, STRINGS

DATA = Path(__file__).parent / "data"
PORT = 18931


def write(name: str, value: object) -> None:
    (DATA / name).write_text(json.dumps(value, ensure_ascii=True, separators=(",", ":")) + "\n")


def fixtures() -> None:
    import sentencepiece  # type: ignore[import-not-found]
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    corpus = [*PROSE, *PROSE, *(text for text in STRINGS if len(text) < 400)]
    tokenizer.train_from_iterator(corpus, trainer)
    state = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].get)
    write("byte_level.json", {"tokens": tokens, "merges": [" ".join(pair) for pair in state["merges"]]})

    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "corpus.txt"
        text.write_text("\n".join(line for part in PROSE * 20 for line in part.split("\n") if line.strip()))
        sentencepiece.SentencePieceTrainer.train(
            input=str(text), model_prefix=str(Path(folder) / "m"), model_type="bpe", vocab_size=900, byte_fallback=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=0.98,
            allow_whitespace_only_pieces=True, split_digits=True, max_sentence_length=100000,
            user_defined_symbols=["<think>", "[INST]"], control_symbols=["<|im_start|>", "<|im_end|>"],
        )  # fmt: skip
        model = sentencepiece.SentencePieceProcessor(model_file=str(Path(folder) / "m.model"))
    ids = range(model.get_piece_size())
    kinds = [
        2 if model.is_unknown(id) else 3 if model.is_control(id) else 6 if model.is_byte(id) else 1
        for id in ids
    ]
    pieces = [model.id_to_piece(id) for id in ids]
    for token in ("<think>", "[INST]"):
        kinds[pieces.index(token)] = 4
    write(
        "sentencepiece.json",
        {"tokens": pieces, "scores": [model.get_score(id) for id in ids], "types": kinds},
    )
    write("sentencepiece_ids.json", [digest(model.encode(text)) for text in STRINGS])


def llamacpp() -> None:
    """Ids by llama.cpp's server, which wants a model: one tiny layer of zeros behind each tokenizer."""
    import xllamacpp  # type: ignore[import-not-found]

    from mpillm.catalogue.models import resolve

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        jobs = {"smollm2": resolve("smollm2-135m")}
        for name, fields in vocabularies.ALL.items():
            jobs[name] = Path(folder) / f"{name}.gguf"
            vocabularies.write_gguf(jobs[name], fields(), tensors=_tiny)
        for name, path in jobs.items():
            params = xllamacpp.CommonParams()
            params.model.path, params.n_ctx, params.n_parallel, params.warmup, params.port = (
                str(path),
                256,
                1,
                False,
                PORT,
            )
            params.cpuparams.n_threads = 1
            server = xllamacpp.Server(params)
            for special in (False, True):
                answers = [
                    _post(server.listening_address, content=text, add_special=True, parse_special=special)
                    for text in STRINGS
                ]
                found[f"{name}{'+special' if special else ''}"] = [digest(ids) for ids in answers]
            del server
    write("llamacpp_ids.json", found)


def _post(address: str, **body: object) -> list[int]:
    request = urllib.request.Request(
        f"{address}/tokenize", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        tokens: list[int] = json.loads(answer.read())["tokens"]
    return tokens


def _tiny(vocab: int) -> dict[str, Any]:
    zeros: dict[str, tuple[int, ...]] = {
        "attn_q": (32, 32),
        "attn_k": (32, 32),
        "attn_v": (32, 32),
        "attn_output": (32, 32),
        "ffn_gate": (32, 32),
    }
    zeros |= {"ffn_up": (32, 32), "ffn_down": (32, 32), "attn_norm": (32,), "ffn_norm": (32,)}
    shapes: dict[str, tuple[int, ...]] = {f"blk.0.{name}.weight": shape for name, shape in zeros.items()}
    shapes |= {"token_embd.weight": (vocab, 32), "output_norm.weight": (32,)}
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def transformers() -> None:
    import transformers

    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name, template in chats.TEMPLATES.items():
            where = Path(folder) / name
            vocabularies.write_directory(where, chats.STYLE[name], template)
            tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(where)
            for number, (messages, options) in enumerate(chats.CONVERSATIONS):
                if "strftime" in template:
                    options = {"date_string": "26 Jul 2024", **options}
                options = {"add_generation_prompt": True, **options}
                case: dict[str, Any] = {"template": name, "conversation": number}
                try:
                    case["text"] = tokenizer.apply_chat_template(messages, tokenize=False, **options)
                    case["ids"] = digest(
                        tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
                    )
                except Exception as error:
                    case = {"template": name, "conversation": number, "error": str(error)}
                found.append(case)
        encoded = {}
        for style in vocabularies.STYLES:
            where = Path(folder) / style
            vocabularies.write_directory(where, style)
            tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(where)
            ids = [tokenizer.encode(text) for text in STRINGS]
            texts = [
                tokenizer.decode(one, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                for one in ids
            ]
            encoded[style] = {
                "ids": [digest(one) for one in ids],
                "texts": [digest(list(map(ord, one))) for one in texts],
            }
    write("transformers.json", {"chats": found, "strings": encoded})


if __name__ == "__main__":
    for step in sys.argv[1:] or ["fixtures", "llamacpp", "transformers"]:
        {"fixtures": fixtures, "llamacpp": llamacpp, "transformers": transformers}[step]()
