"""Adapters in files: which are refused, in which words, and what those of GGUF files add."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mpillm.engine.request import Request
from mpillm.errors import MpillmError
from mpillm.model.adapters import Adapters
from mpillm.model.opening import config_of, open_source
from mpillm.partition.grid import Place
from tests.model.adapted import folder, numbered
from tests.model.checks import digest, requests_of
from tests.model.engine_harness import run_engine
from tests.model.golden import FIXTURES, golden, model_path

Tensors = dict[str, Any]
LAYER = "base_model.model.model.layers.0."
Q = LAYER + "self_attn.q_proj.lora_A.weight"


def rename(old: str, new: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return edit


def put(name: str, value: Any) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: np.asarray(value, np.float32)})


@pytest.mark.parametrize(
    ("words", "config", "edit"),
    [
        ("use_dora = True is not supported", {"use_dora": True}, None),
        (r"modules_to_save = \['lm_head'\] is not supported", {"modules_to_save": ["lm_head"]}, None),
        ("bias = lora_only is not supported", {"bias": "lora_only"}, None),
        ("lora_bias = True is not supported", {"lora_bias": True}, None),
        ("target_parameters = .* is not supported", {"target_parameters": ["mlp.experts.gate_up_proj"]}, None),
        ("peft_type is 'LOHA'; LORA is supported", {"peft_type": "LOHA"}, None),
        ("init_lora_weights = 'pissa' changes the model's own weights", {"init_lora_weights": "pissa"}, None),
        ("have rank 4, but adapter_config.json says 5", {"r": 5}, None),
        ("lora_alpha is many", {"lora_alpha": "many"}, None),
        ("lora_alpha is None", {"alpha_pattern": 3}, None),
        ("is not a factor of a linear layer", {}, put("base_model.model.lm_head.weight", [[1.0]])),
        ("adapts embeddings", {}, rename("self_attn.q_proj.lora_", "embed_tokens.lora_embedding_")),
        ("embeddings and of the LM head are not", {}, rename("model.layers.0.self_attn.q_proj", "lm_head")),
        ("is DoRA's", {}, put(LAYER + "self_attn.q_proj.lora_magnitude_vector.weight", [1.0])),
        ("only one of the two factors of 'model.layers.0.self_attn.q_proj'", {}, lambda tensors: tensors.pop(Q)),
        ("cannot be multiplied", {}, put(Q, np.ones((3, 24)))),
        ("the adapter was made for another model", {}, put(Q, np.ones((4, 32)))),
        ("the model has no layer 2; the adapter was made", {}, rename("layers.1.", "layers.2.")),
        ("which the model does not have", {}, rename("q_proj", "query_key_value")),
        ("adapters of experts are not supported", {}, rename("mlp.gate_proj", "mlp.experts.0.gate_proj")),
        ("router of layer 0 are not supported in this model", {}, rename("mlp.gate_proj", "mlp.gate")),
        ("is not a matrix", {}, rename("self_attn.q_proj", "input_layernorm")),
        ("values that are not finite", {}, put(Q, np.full((4, 24), np.nan))),
        ("but must be a matrix", {}, put(Q, np.ones(4))),
    ],
)  # fmt: skip
def test_refused(tmp_path: Path, words: str, config: dict[str, Any], edit: Any) -> None:
    own = shutil.copytree(FIXTURES / "adapters/chat_all", tmp_path / "adapter")
    said = json.loads((own / "adapter_config.json").read_text())
    (own / "adapter_config.json").write_text(json.dumps({**said, **config}))
    if edit:
        tensors = load_file(own / "adapter_model.safetensors")
        edit(tensors)
        save_file(tensors, own / "adapter_model.safetensors")
    refused(words, own)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_is_missing(tmp_path: Path, name: str) -> None:
    own = shutil.copytree(FIXTURES / "adapters/chat_all", tmp_path / "adapter")
    (own / name).unlink()
    refused(f"has no {name}", own)
    refused("which does not exist", tmp_path / "nowhere")


def test_recurrent_layers_are_not_adapted(tmp_path: Path) -> None:
    own = shutil.copytree(FIXTURES / "adapters/qwen3_next_attention", tmp_path / "adapter")
    tensors = load_file(own / "adapter_model.safetensors")
    rename("self_attn.o_proj", "linear_attn.out_proj")(tensors)
    save_file(tensors, own / "adapter_model.safetensors")
    refused("not supported in this model", own, "qwen3_next")


def test_an_adapter_is_not_called_as_the_model_is() -> None:
    refused("The adapter 'chat' has the name of the model", FIXTURES / "adapters/chat_all", name="chat")


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_gguf(
    path: Path, kind: str = "adapter", architecture: str = "llama", suffix: str = ".weight"
) -> Path:
    """The adapter chat_all as llama.cpp's converter writes it: rows of q and k have the halves of heads interleaved."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(kind)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    for name, value in load_file(FIXTURES / "adapters/chat_all/adapter_model.safetensors").items():
        layer, module, factor = re.fullmatch(r".*layers\.(\d)\.(.*)\.lora_(.)\.weight", name).groups()  # type: ignore[union-attr]
        if factor == "B" and module.endswith(("q_proj", "k_proj")):
            value = value.reshape(-1, 2, 4, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(f"blk.{layer}.{GGUF_NAMES[module]}{suffix}.lora_{factor.lower()}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_adapter_adds_what_the_same_one_of_peft_does(tmp_path: Path) -> None:
    requests = requests_of(golden("chat_all.adapter"))
    adapters = {"a": folder("chat_all"), "b": str(write_gguf(tmp_path / "adapter.gguf"))}
    twice = [*numbered(requests, 1), *numbered(requests, 2, "gguf-")]
    found = run_engine(model_path("chat"), twice, threads=1, adapters=adapters)
    one, other = found[: len(requests)], found[len(requests) :]
    assert digest(one) == digest([replace(b, request=a.request) for a, b in zip(one, other, strict=True)])


ADAPTED = re.compile(r"blk\.\d+\.(attn_(q|k|v|output|qkv)|ffn_(gate|up|down))\.weight")


def write_both(model: Path, folder: Path) -> tuple[Path, Path]:
    """A random adapter of most of a GGUF file's matrices, and the file with the adapter added to them."""
    draw = np.random.default_rng(7)
    read = gguf.GGUFReader(model)
    kind = read.fields["general.architecture"].contents()
    adapter, merged = gguf.GGUFWriter(folder / "a.gguf", kind), gguf.GGUFWriter(folder / "m.gguf", kind)
    adapter.add_type("adapter")
    adapter.add_string("adapter.type", "lora")
    adapter.add_float32("adapter.lora.alpha", 6.0)
    for field in read.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            merged.add_key_value(field.name, field.contents(), field.types[0], sub_type=field.types[-1])
    for tensor in read.tensors:
        value = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        value = value.reshape(tensor.shape[::-1])
        if ADAPTED.fullmatch(tensor.name):
            a, b = (
                draw.normal(0, 0.2, shape).astype(np.float32)
                for shape in ((3, value.shape[1]), (len(value), 3))
            )
            adapter.add_tensor(f"{tensor.name}.lora_a", a)
            adapter.add_tensor(f"{tensor.name}.lora_b", b)
            value = value + np.float32(6.0 / 3) * (b @ a)
        merged.add_tensor(tensor.name, value)
    for writer in (adapter, merged):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return folder / "a.gguf", folder / "m.gguf"


@pytest.mark.parametrize(
    "name", ["llama_f16_factors", "mixtral_f16", "phi3_f16", "gpt2_f16", "deepseek2_f16"]
)
def test_a_gguf_adapter_adds_to_the_files_own_matrices(name: str, tmp_path: Path) -> None:
    model = FIXTURES / "gguf" / f"{name}.gguf"
    adapter, merged = write_both(model, tmp_path)
    prompt = tuple(range(3, 43))
    plain = Request(id="0", prompt=prompt, max_tokens=0, prompt_logprobs=1)
    job: dict[str, Any] = {"activations": "f32", "kv_type": "f32", "threads": 1}
    found = run_engine(model, [plain, replace(plain, id="1", adapter=1)], adapters={"a": str(adapter)}, **job)
    [want] = run_engine(merged, [plain], **job)
    np.testing.assert_allclose(found[1].prompt_logprobs, want.prompt_logprobs, atol=1e-4)
    assert np.abs(np.subtract(found[0].prompt_logprobs, want.prompt_logprobs)).max() > 0.5


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("is not a LoRA adapter", {"kind": "model"}),
        ("for a model of architecture 'gemma3', which this one is not", {"architecture": "gemma3"}),
        ("which the model does not have", {"suffix": ".wait"}),
    ],
)
def test_gguf_files_that_are_refused(tmp_path: Path, words: str, options: dict[str, str]) -> None:
    refused(words, write_gguf(tmp_path / "adapter.gguf", **options))


def load(adapter: Path, model: str, name: str) -> None:
    """Load an adapter as a job does."""
    with (
        closing(open_source(model_path(model))) as source,
        closing(Adapters({name: str(adapter)}, source, config_of(source))) as adapters,
    ):
        adapters.load(Place(0, 1, 1))


def refused(words: str, adapter: Path, model: str = "chat", name: str = "one") -> None:
    with pytest.raises(MpillmError, match=words):
        load(adapter, model, name)
