"""Makes expected.json: what the harness's `hf` answers with on the tiny chat model, in float32.

python -m tests.lm_eval.make_expected      where lm_eval, torch and transformers are installed
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
MODEL = "tests/fixtures/models/chat"
TASKS = ["--tasks", "tiny_choice,tiny_generation,tiny_rolling", "--include_path", "tests/lm_eval"]
EXAMPLES = ["--num_fewshot", "1", "--fewshot_as_multiturn", "True"]
RUNS = {
    "plain": [],
    "chat": ["--apply_chat_template", "--system_instruction", "Be brief.", *EXAMPLES],
    "served": [],
    "served with BOS": [],
}
# More arguments of the model.
ARGS = {
    "plain": "add_bos_token=True",
    "chat": "add_bos_token=False",
    "served": "add_bos_token=False",
    "served with BOS": "add_bos_token=True",
}
# Of a context of 512 tokens; what asks a server keeps one token for its answer.
MAX_LENGTH = {"plain": 511, "chat": 511, "served": 510, "served with BOS": 510}


def read(directory: Path) -> dict[str, Any]:
    """Of each task what was answered to each of its documents, and the metrics, from a run with `--log_samples`."""
    found: dict[str, Any] = {}
    for path in sorted(directory.glob("**/samples_*.jsonl")):
        samples = sorted(
            map(json.loads, path.read_text().splitlines()), key=lambda sample: int(sample["doc_id"])
        )
        answers = [[answer for (answer,) in sample["resps"]] for sample in samples]
        found[path.name.removeprefix("samples_").rpartition("_")[0]] = {"answers": answers}
    (results,) = directory.glob("**/results_*.json")
    for task, metrics in json.loads(results.read_text())["results"].items():
        numbers = {
            key: value for key, value in metrics.items() if isinstance(value, float) and "stderr" not in key
        }
        found[task]["metrics"] = numbers
    return found


if __name__ == "__main__":
    expected = {}
    for name, words in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            model = [
                "--model",
                "hf",
                "--model_args",
                f"pretrained={MODEL},dtype=float32,max_length={MAX_LENGTH[name]},{ARGS[name]}",
            ]
            rest = ["--device", "cpu", "--output_path", folder, "--log_samples"]
            subprocess.run(
                [sys.executable, "-m", "lm_eval", *model, *TASKS, *words, *rest], cwd=ROOT, check=True
            )
            expected[name] = read(Path(folder))
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
