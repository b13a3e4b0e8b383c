"""Everything that reads bytes somebody else may have made, as functions of those bytes.

A target returns if the bytes were taken, or refused by the error that they are to be refused by; whatever else it
raises is a finding. Those that want files get a folder of their own, in memory where the machine has such a place.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from mpillm import spec
from mpillm.batch import requests
from mpillm.batch.work import Line, Model
from mpillm.engine import messages
from mpillm.engine.reply import Reply, merge
from mpillm.engine.step import Chunk, Shifts, Step, Table
from mpillm.errors import JobError, LayoutError, ModelError, OutputError, RequestError
from mpillm.model.families import read_config
from mpillm.model.opening import config_of, open_source
from mpillm.partition.grid import Place
from mpillm.store.journal import Journal
from mpillm.store.journal_facts import finished
from mpillm.store.output import Claim
from mpillm.text import load_tokenizer
from mpillm.weights.formats.safetensors import read_metadata
from mpillm.weights.io.mapped import MappedFile
from mpillm.weights.source import check_tensors, rank_plans
from tests.conftest import ROOT, clean_environment
from tests.fuzz.body_target import body_target
from tests.fuzz.target import Target
from tests.weights.build import Tiny, write_gguf

MODELS = ROOT / "tests" / "fixtures" / "models"
SMALL = 1 << 22  # bytes of a tensor that is worth decoding here
TEXT = "The <|im_end|> caf\u00e9,\n\n  123 \U0001f600\u0000 end"


def make(name: str) -> contextlib.AbstractContextManager[Target]:
    """The target of that name, with a folder for its files while it is used."""
    return _make(TARGETS[name])


@contextlib.contextmanager
def _make(target: Callable[[Path], Target]) -> Iterator[Target]:
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory if memory.is_dir() else None) as folder:
        yield target(Path(folder))


def _safetensors(folder: Path) -> Target:
    """An even first byte: a file as it is; an odd one: its header, with the right length before it and some data."""
    path = folder / "m.safetensors"

    def run(data: bytes) -> None:
        framed = bool(data) and data[0] % 2
        length = max(len(data) - 1, 0).to_bytes(8, "little")
        path.write_bytes(length + data[1:] + bytes(64) if framed else data[1:])
        with contextlib.suppress(ModelError), contextlib.closing(MappedFile(path)) as file:
            tensors, metadata = read_metadata(file)
            assert all(8 <= one.offset <= one.offset + one.nbytes <= file.size for one in tensors.values())
            assert all(isinstance(text, str) for text in metadata.values())

    whole = (MODELS / "llama3" / "model.safetensors").read_bytes()
    short = json.dumps({"a": {"dtype": "F32", "shape": [2, 8], "data_offsets": [0, 64]}}).encode()
    return Target(
        run,
        [b"\0" + whole[:20_000], b"\1" + short],
        (*_JSON, b"data_offsets", b"dtype", b"shape", b"BF16", b"F4"),
    )


def _gguf(folder: Path) -> Target:
    """A GGUF model: header, configuration, tensors, and its tokenizer."""
    path = folder / "m.gguf"
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "\u2581a", "b", "<0x0A>", "ab", "c"],
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -1.0, -2.0, 0.0, -0.5, -3.0],
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 6, 1, 1],
        "tokenizer.chat_template": "{{ messages }}",
    }
    model = Tiny(hidden=32, n_layers=1, n_heads=2, n_kv_heads=1, intermediate=32, vocab=8)
    seeds = [write_gguf(path, model, types=("Q8_0", "F32"), extra=fields).read_bytes()]
    seeds.append(write_gguf(path, model, types=("Q4_0",), arch="qwen2", extra={}).read_bytes())

    def run(data: bytes) -> None:
        path.write_bytes(data)
        with contextlib.suppress(ModelError, LayoutError), contextlib.closing(open_source(path)) as source:
            _use(source)
            load_tokenizer(source.tokenizer, config_of(source).vocab)

    return Target(
        run, seeds, (b"GGUF", b"general.architecture", b"split.count", b"tokenizer.ggml.tokens", b"llama")
    )


def _use(source: object) -> None:
    """What a rank does with a source before its first step, and a look at what is small."""
    assert hasattr(source, "config")
    config = config_of(source)
    check_tensors(source, config)
    if config.n_layers > 8 or any(layer.mlp.count > 64 for layer in config.layers):
        return
    plans = rank_plans(config, Place(0, 1, 1), source)
    assert all(plan.nbytes >= 0 for plan in plans)
    if config.vocab * config.hidden * 4 < SMALL:
        source.read_f32(next(key for key in source.tensors if key.role == "embed"))


def _packed(folder: Path) -> Target:
    """A packed model; the first byte says which of its files the rest replaces."""
    sound, model = folder / "sound", folder / "packed"
    command = [sys.executable, "-m", "mpillm", "pack", MODELS / "llama3", sound, "--weights", "q8_0"]
    subprocess.run(command, check=True, env=clean_environment(), capture_output=True)
    shutil.copytree(sound, model)
    files = sorted(path.relative_to(sound) for path in sound.rglob("*") if path.is_file())

    def run(data: bytes) -> None:
        name = files[(data or b"\0")[0] % len(files)]
        kept = (sound / name).read_bytes()
        length = int.from_bytes(kept[:8], "little")
        given = data[1:]
        if name.suffix == ".safetensors":  # only its header is fuzzed, so that the rest need not be mutated
            given = len(given).to_bytes(8, "little") + given + kept[8 + length :]
        (model / name).write_bytes(given)
        try:
            with (
                contextlib.suppress(ModelError, LayoutError),
                contextlib.closing(open_source(model)) as source,
            ):
                _use(source)
        finally:
            (model / name).write_bytes(kept)

    seeds = []
    for number, name in enumerate(files):
        raw = (sound / name).read_bytes()
        if name.suffix == ".safetensors":
            raw = raw[8 : 8 + int.from_bytes(raw[:8], "little")].rstrip()
        seeds.append(bytes([number]) + raw)
    return Target(
        run, [seed for seed in seeds if len(seed) < 60_000], (*_JSON, b"pieces", b"panel", b"sha256")
    )


def _tokenizer(folder: Path) -> Target:
    """tokenizer.json of a Hugging Face directory, and what its tokenizer does with a text."""
    for name in ("tokenizer_config.json", "special_tokens_map.json", "config.json"):
        if (MODELS / "chat" / name).exists():
            shutil.copy(MODELS / "chat" / name, folder)

    def run(data: bytes) -> None:
        (folder / "tokenizer.json").write_bytes(data)
        with contextlib.suppress(ModelError, RequestError):
            tokenizer = load_tokenizer(folder)
            if tokenizer is not None:
                ids = tokenizer.encode(TEXT)
                tokenizer.decode([*ids, 5, 10**6])

    whole = json.loads((MODELS / "chat" / "tokenizer.json").read_text())
    return Target(
        run,
        [json.dumps(whole).encode()],
        (*_JSON, b"ByteLevel", b"Metaspace", b"Split", b"Regex", b"BPE", b"Replace"),
    )


def _config(folder: Path) -> Target:
    """config.json."""

    def run(data: bytes) -> None:
        with contextlib.suppress(ValueError, RecursionError):  # what is no JSON is refused before
            config = json.loads(data)
            if isinstance(config, dict):
                with contextlib.suppress(ModelError):
                    assert read_config(config).with_block(32).max_shards

    seeds = [(path / "config.json").read_bytes() for path in sorted(MODELS.iterdir())]
    return Target(run, seeds, (*_JSON, b"rope_scaling", b"yarn", b"llama3", b"head_dim", b"num_experts"))


def _toml(folder: Path) -> Target:
    """A job file."""

    def run(data: bytes) -> None:
        (folder / "job.toml").write_bytes(data)
        with contextlib.suppress(JobError):
            spec.load(folder / "job.toml").fingerprint()

    seeds = [path.read_bytes() for path in sorted((ROOT / "jobs").glob("*.toml"))]
    seeds.append(
        b'input = "a"\noutput = "b"\n[memory]\nweights = "2GiB"\n[sampling]\nstop = ["x", "y"]\nseed = -1\n'
    )
    return Target(
        run,
        seeds,
        (b"[layout]", b'"auto"', b"[[", b"]]", b"inf", b"nan", b"1e400", b"{", b"'''", b"~", b"\\u0000"),
    )


def _jsonl(folder: Path) -> Target:
    """An input's lines; what is taken is put into requests."""
    text = load_tokenizer(MODELS / "chat")
    assert text is not None
    job = spec.load(None, input=str(folder / "in.jsonl"), output=str(folder / "out"))
    model = Model(vocab=text.vocab_size, max_position=512, end_ids=frozenset({0}), kv_tokens=4096, text=text)

    def run(data: bytes) -> None:
        job.input_path.write_bytes(data)
        with contextlib.suppress(JobError):
            batch = requests.check(job.input_path, job, model)
            for work in batch.works():
                assert work.requests

    lines = [
        b'{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user", '
        b'"content": [{"type": "text", "text": "x"}]}], "n": 2, "stop": ["a"], "logprobs": true, "top_logprobs": 3}}',
        b'{"prompt": [[1, 2], [3]], "max_tokens": 0, "echo": true, "logprobs": 1}\n'
        b'{"input": ["a", [5]], "pooling": "last"}',
        b'{"prompt": "a", "seed": -1, "temperature": 0.5, "top_k": -1, "stop_token_ids": [1], '
        b'"repetition_penalty": 1.5}',
    ]
    return Target(
        run, lines, (*_JSON, b"max_tokens", b"\\ud800", b"messages", b"null", b"chat_template_kwargs")
    )


def _step(folder: Path) -> Target:
    """What ranks are told: steps, requests for candidates, the end."""

    def run(data: bytes) -> None:
        with contextlib.suppress(ValueError):
            step = messages.decode(data)
            if isinstance(step, Step):
                assert len(step.batch().tokens) == sum(len(part.tokens) for part in step.chunks)
                assert len(step.hidden_rows()) <= len(step.batch().tokens)
                assert messages.encode(step)[20:] == data[20:]

    ids = np.arange(40, dtype=np.int32)
    shifts = Shifts(ids[:2], ids[2:4].astype(np.float32), ids[4:6].astype(np.float32))
    parts = (
        Chunk(0, ids, (Table(0, ids[:2]), Table(0, ids[2:4])), score_k=3, successor=7),
        Chunk(64, ids[:1], (Table(0, ids[:3]), Table(1, ids[:2])), 6, sample_k=5, seen=ids, penalty=1.5),
        Chunk(64, ids[:1], (Table(0, ids[:3]), Table(1, ids[:2])), shifts=shifts, allowed=ids[:2]),
    )
    sent = (Step(3, parts), messages.Fetch(1, (4, 2), 99), messages.Stop(75))
    return Target(run, [messages.encode(message) for message in sent])


def _reply(folder: Path) -> Target:
    """What the last stage answers, and its merging."""
    ids = np.arange(4, dtype=np.int32)
    step = Step(
        7, (Chunk(0, ids, (), sample_k=4, temperature=0.5), Chunk(0, ids, (), score_k=2, successor=1))
    )
    outputs = step.outputs

    def run(data: bytes) -> None:
        with contextlib.suppress(ValueError), np.errstate(all="ignore"):
            merge([Reply.decode(data, 8)], outputs, [50])

    counts = sum(output.k for output in outputs)
    floats = np.ones((len(outputs), 2, 4), np.float32)
    candidates = np.resize(ids, counts), np.ones(counts, np.float32), np.ones(counts, np.float32)
    reply = Reply(7, *candidates, floats, floats[:, 0, 0], np.ones((1, 8), np.float32))
    return Target(run, [reply.encode()])


def _journal(folder: Path) -> Target:
    """A journal: what the kernel has locked may still have been written by anybody."""
    lines = [Line(n, 0, 0, f"r{n}", f"r{n}".encode()) for n in range(5)]
    out = folder / "out"
    with Claim(out) as claim, Journal(claim, {"a": 1}, lines):
        seed = (out / "journal").read_bytes()

    def run(data: bytes) -> None:
        (out / "journal").write_bytes(data)
        with contextlib.suppress(OutputError), Claim(out) as claim:
            finished(out)
            with Journal(claim, {"a": 1}, lines) as journal:
                for line in lines:
                    journal.partial(line)
                for name in journal.finished():
                    journal.read(name)

    return Target(run, [seed, seed[:-3]], (b"mpiJ",))


_JSON = (
    b"null",
    b"true",
    b"-1",
    b"0.5",
    b"1e999",
    b"{}",
    b"[]",
    b'""',
    b"[[[[",
    b"9" * 30,
    b"18446744073709551616",
    b"\\u0000",
)

TARGETS: dict[str, Callable[[Path], Target]] = {
    "safetensors": _safetensors,
    "gguf": _gguf,
    "packed": _packed,
    "tokenizer": _tokenizer,
    "config": _config,
    "toml": _toml,
    "jsonl": _jsonl,
    "bodies": body_target,
    "step": _step,
    "reply": _reply,
    "journal": _journal,
}

os.environ.setdefault("RUST_BACKTRACE", "0")
