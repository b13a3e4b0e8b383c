"""Pulls that are killed in the midst of a file: nothing half is taken for whole, and what is whole is kept."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.catalogue.slow_hub import slow_hub
from tests.conftest import clean_environment

pytest.importorskip("huggingface_hub")

SIZE = 1 << 17
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 9,
}  # fmt: skip
HEAD = b"GGUF" + bytes(20) + b"general.architecture" + (8).to_bytes(4, "little") + (5).to_bytes(8, "little")
REPOSITORIES = {
    "hf:owner/name/m.gguf": ["m.gguf"],
    "hf:owner/name/m-00002-of-00003.gguf": [f"m-0000{part}-of-00003.gguf" for part in (1, 2, 3)],
    "hf:owner/name": ["config.json", *(f"model-0000{part}-of-00003.safetensors" for part in (1, 2, 3))],
}


def contents(name: str, seed: int) -> bytes:
    if name == "config.json":
        return json.dumps(CONFIG).encode()
    return HEAD + b"llama" + random.Random(f"{name} {seed}").randbytes(SIZE)


@pytest.mark.parametrize(
    ("name", "number", "moment"),
    [
        ("hf:owner/name/m.gguf", signal.SIGKILL, 0.9),
        ("hf:owner/name/m-00002-of-00003.gguf", signal.SIGTERM, 0.2),
        ("hf:owner/name/m-00002-of-00003.gguf", signal.SIGKILL, 0.8),
        ("hf:owner/name", signal.SIGINT, 0.5),
        ("hf:owner/name", signal.SIGKILL, 0.7),
    ],
)
def test_killed_in_the_midst(name: str, number: signal.Signals, moment: float, tmp_path: Path) -> None:
    files = {file: contents(file, int(moment * 10)) for file in REPOSITORIES[name]}
    total = sum(map(len, files.values()))
    command = [sys.executable, "-m", "mpillm", "pull", name]
    with slow_hub(files) as hub:
        env = clean_environment(
            HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "hf"), MPILLM_CACHE=str(tmp_path / "cache")
        )

        def pull() -> subprocess.Popen[str]:
            return subprocess.Popen(
                command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )

        hub.limit = int(moment * total)
        with pull() as killed:
            hub.reached.wait()
            killed.send_signal(number)
            said = killed.communicate()[1]
        if number == signal.SIGKILL:
            assert list(tmp_path.rglob("*.incomplete"))
        else:
            assert killed.returncode == 75, said
            assert (
                f" of {len(files)} files of {name} complete; run the same command again to fetch the others."
                in said
            )
            assert "Traceback" not in said
        whole = sum(path.stat().st_size for path in tmp_path.rglob("blobs/*") if path.suffix != ".incomplete")
        assert whole >= int(moment * len(files)) * SIZE - SIZE

        hub.limit, hub.served = 2 * total, 0
        hub.goes_on.set()
        with pull() as one, pull() as other:
            paths = {Path(process.communicate()[0].strip()) for process in (one, other)}
        assert (one.returncode, other.returncode, len(paths)) == (0, 0, 1)
        path = paths.pop()
        folder = path if path.is_dir() else path.parent
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == files
        sent_late = SIZE // 2  # to the killed one, at most
        assert hub.served <= total - whole + sent_late, "what was whole is fetched no more"
        assert not list(tmp_path.rglob("*.incomplete"))
