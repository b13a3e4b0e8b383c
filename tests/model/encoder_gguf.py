"""GGUF twins of the small encoders, with the names and fields that llama.cpp's converter writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import MODEL_ARCH, GGUFWriter
from safetensors.numpy import load_file

from tests.model.pooled import FOLDER

ARCHITECTURES = {
    "bert": MODEL_ARCH.BERT,
    "xlm-roberta": MODEL_ARCH.BERT,
    "nomic_bert": MODEL_ARCH.NOMIC_BERT,
    "modernbert": MODEL_ARCH.MODERN_BERT,
    "gemma3_text": MODEL_ARCH.GEMMA_EMBEDDING,
}
UNREAD = ("lm_head", "pooler")


def write(name: str, path: Path, pooling: gguf.PoolingType, **more: np.ndarray) -> None:
    """The file of a small encoder, all of float32; `more` tensors by their names, with _ for the last dot."""
    config: dict[str, Any] = json.loads((FOLDER / name / "config.json").read_text())
    kind = config["model_type"]
    arch = ARCHITECTURES[kind]
    writer = GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    _metadata(writer, config, kind)
    writer.add_pooling_type(pooling)
    if "id2label" in config and "ForSequence" in config["architectures"][0]:
        writer.add_classifier_output_labels(list(config["id2label"].values()))
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    classifies = "ForSequence" in config["architectures"][0]
    for key, value in load_file(FOLDER / name / "model.safetensors").items():
        stem, _, suffix = key.rpartition(".")
        for prefix in ("bert.", "roberta.", "model.") if kind != "gemma3_text" else ():
            stem = stem.removeprefix(prefix)
        if kind == "gemma3_text":
            stem = stem if stem.startswith("model.") else f"model.{stem}"
        if stem.startswith(UNREAD) and not (classifies and stem == "pooler.dense"):
            continue
        if stem == "classifier":
            stem = "classifier.out_proj"
        if kind == "xlm-roberta" and stem == "embeddings.position_embeddings":
            value = value[config["pad_token_id"] + 1 :]
        if kind == "gemma3_text" and "norm" in stem:
            value = value + np.float32(1)
        found = "cls" if stem == "pooler.dense" else names.get_name(stem)
        assert found is not None, key
        writer.add_tensor(f"{found}.{suffix}", value.astype(np.float32))
    for key, value in more.items():
        writer.add_tensor(f"{key}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _metadata(writer: GGUFWriter, config: dict[str, Any], kind: str) -> None:
    positions = config["max_position_embeddings"]
    writer.add_context_length(positions - (config["pad_token_id"] + 1 if kind == "xlm-roberta" else 0))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_causal_attention(False)
    if kind == "gemma3_text":
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_sliding_window(config["sliding_window"])
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
        writer.add_rope_freq_base(config["rope_parameters"]["full_attention"]["rope_theta"])
        return
    writer.add_layer_norm_eps(config.get("layer_norm_eps") or config["norm_eps"])
    if kind == "nomic_bert":
        writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    if kind == "modernbert":
        writer.add_sliding_window(config["local_attention"])
        writer.add_sliding_window_pattern(3)
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_freq_base(config["rope_parameters"]["full_attention"]["rope_theta"])
