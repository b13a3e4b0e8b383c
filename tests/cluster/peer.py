"""Distributed-Llama on the hosts of `table.py`: a model file that both run, and what its root prints."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Type

from mpillm.bench.random_blocks import random_blocks
from mpillm.bench.synthetic_shapes import SHAPES
from tests.cluster.hosts import Hosts
from tests.cluster.ranks import Measured
from tests.weights.dllama_files import header_bytes, header_of, write_tokenizer

PORT = 9998


def write_model(path: Path) -> None:
    """The shape llama-1b with random weights, and its tokenizer, in which every letter is a token."""
    shape = SHAPES["llama-1b"]
    d, kv, ffn = shape.hidden, shape.kv_heads * shape.head_dim, shape.ffn
    config = {
        "model_type": "llama", "hidden_size": d, "intermediate_size": ffn, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "rope_theta": 10_000,
        "max_position_embeddings": 2048, "vocab_size": shape.vocab, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    matrices = ((d, d), (kv, d), (kv, d), (d, d), (ffn, d), (d, ffn), (ffn, d))
    with path.open("wb") as file:
        file.write(header_bytes(dict(header_of(config, "q40"))))
        file.write(_values(Type.F32, shape.vocab, d))
        for _ in range(shape.layers):
            for rows, columns in matrices:
                file.write(_values(Type.Q4_0, rows, columns))
            file.write(2 * np.ones(d, np.float32).tobytes())
        file.write(np.ones(d, np.float32).tobytes())
        file.write(_values(Type.Q4_0, shape.vocab, d))
    tokens = [bytes([byte]) for byte in range(256)] + [b"<%d>" % n for n in range(256, shape.vocab)]
    write_tokenizer(path.with_suffix(".t"), tokens, 256, [257], add_bos=False)


def _values(kind: Type, rows: int, columns: int) -> bytes:
    pool = random_blocks(kind, columns)
    return np.resize(pool, (rows * columns // (32 if kind is Type.Q4_0 else 1), pool.shape[1])).tobytes()


def run(program: Path, hosts: Hosts, model: Path, prompt: int, tokens: int) -> Measured:
    """One run of its root on the first host with a worker on each other one, a thread each."""
    words = ["--port", str(PORT), "--nthreads", "1"]
    workers = [
        subprocess.Popen(
            ["ip", "netns", "exec", f"{hosts.prefix}{number}", program, "worker", *words],
            stdout=subprocess.DEVNULL,
        )
        for number in hosts.numbers[1:]
    ]
    time.sleep(0.5)
    command = ["ip", "netns", "exec", f"{hosts.prefix}1", program, "inference", "--model", model]
    command += [
        "--tokenizer",
        model.with_suffix(".t"),
        "--prompt",
        "x" * prompt,
        "--steps",
        str(prompt + tokens),
    ]
    command += ["--nthreads", "1", "--max-seq-len", "512", "--buffer-float-type", "q80", "--temperature", "0"]
    if workers:
        command += ["--workers", *(f"{address}:{PORT}" for address in hosts.addresses[1:])]
    began = time.time()
    root = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    try:
        said, first, counts, memory = "", 0.0, list[list[int]](), list[int]()
        assert root.stdout is not None
        for line in root.stdout:
            said += line
            if "Pred" in line and "Prediction" not in line:
                counts.append(hosts.sent())
                first = first or time.time() - began
                if len(counts) == tokens:  # the last one: all of them are still alive
                    memory = [_peak(process.pid) for process in (root, *workers)]
        assert root.wait(60) == 0, said
    finally:
        for process in (root, *workers):
            process.kill()
            process.wait()
    rates = [float(rate) for rate in re.findall(r"tokens/s: ([0-9.]+)", said)]
    carried = [
        (last - before) / (len(counts) - 1) for before, last in zip(counts[0], counts[-1], strict=True)
    ]
    return Measured(rates[0], rates[1], first, carried, memory)


def _peak(pid: int) -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return 1024 * int(found[1]) if found else 0
