"""What a model's files say of what follows pooling: dense layers, tokens that answer, a GGUF file's classifier."""

from __future__ import annotations

import json
import math
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from mpillm.engine.pooled import decide, logits_of, relevance, through
from mpillm.errors import ModelError
from mpillm.model.embedding import EmbeddingSettings, embedding_settings
from mpillm.model.opening import config_of, open_source
from mpillm.model.pooled import Classifier, Decision, Dense, read_classifier
from tests.conftest import ROOT
from tests.job_helpers import CHAT

RANDOM = np.random.default_rng(8)


def settings_of(folder: Path, *modules: tuple[str, dict[str, Any], dict[str, Any]]) -> EmbeddingSettings:
    """What is read of a copy of a model with these modules: their kind, configuration and tensors."""
    shutil.copytree(CHAT, folder)
    listed = [{"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"}]
    for number, (kind, config, tensors) in enumerate(modules, 1):
        path = f"{number}_{kind}"
        (folder / path).mkdir()
        (folder / path / "config.json").write_text(json.dumps(config))
        if tensors:
            save_file(tensors, folder / path / "model.safetensors")
        listed.append({"idx": number, "path": path, "type": f"sentence_transformers.models.{kind}"})
    (folder / "modules.json").write_text(json.dumps(listed))
    with closing(open_source(folder)) as source:
        return embedding_settings(source)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("torch.nn.modules.linear.Identity", lambda x: x),
        ("torch.nn.modules.activation.Tanh", np.tanh),
        ("torch.nn.modules.activation.ReLU", lambda x: np.maximum(x, 0)),
        ("torch.nn.modules.activation.GELU", lambda x: x * (1 + np.vectorize(math.erf)(x / 2**0.5)) / 2),
    ],
)
def test_dense_layers(function: str, expected: Any, tmp_path: Path) -> None:
    first, second = (RANDOM.standard_normal(shape).astype(np.float32) for shape in ((72, 40), (24, 72)))
    bias = RANDOM.standard_normal(72).astype(np.float32)
    said = settings_of(
        tmp_path / "model",
        ("Pooling", {"pooling_mode_mean_tokens": True}, {}),
        ("Dense", {"activation_function": function}, {"linear.weight": first, "linear.bias": bias}),
        ("Dense", {"activation_function": "torch.nn.modules.linear.Identity"}, {"linear.weight": second}),
        ("Normalize", {}, {}),
    )
    assert (said.pooling, said.normalize, said.unsupported, said.width) == ("mean", True, "", 24)
    x = RANDOM.standard_normal(40).astype(np.float32)
    wanted = second @ expected(first.astype(np.float64) @ x + bias)
    np.testing.assert_allclose(through(said.layers, x), wanted, rtol=1e-4, atol=1e-4)


def test_tokens_that_answer(tmp_path: Path) -> None:
    said = settings_of(tmp_path / "1", ("LogitScore", {"true_token_id": 9, "false_token_id": 7}, {}))
    assert said.answers == (7, 9)
    with pytest.raises(ModelError, match="names no answer tokens"):
        settings_of(tmp_path / "2", ("LogitScore", {"true_token_id": None}, {}))
    (tmp_path / "1/sentence_bert_config.json").write_text('{"max_seq_length": "long"}')
    with (
        closing(open_source(tmp_path / "1")) as source,
        pytest.raises(ModelError, match="max_seq_length is long, but must be at least 1"),
    ):
        embedding_settings(source)
    with pytest.raises(ModelError, match="'Softmax' is not supported, but"):
        settings_of(tmp_path / "3", ("Dense", {"activation_function": "torch.nn.Softmax"}, {}))


@pytest.mark.parametrize("decision", ["softmax", "sigmoid", "identity"])
def test_what_becomes_of_logits(decision: Decision) -> None:
    weight = RANDOM.standard_normal((2, 12)).astype(np.float32)
    x = RANDOM.standard_normal(12).astype(np.float32)
    classifier = Classifier("last", (Dense(weight),), ("Yes", "no"), decision)
    logits = logits_of(classifier, x)
    np.testing.assert_allclose(logits, weight @ x, rtol=1e-5, atol=1e-6)
    wide = logits.astype(np.float64)
    wanted = {
        "softmax": np.exp(wide) / np.exp(wide).sum(),
        "sigmoid": 1 / (1 + np.exp(-wide)),
        "identity": wide,
    }
    np.testing.assert_allclose(decide(classifier, logits), wanted[decision], rtol=1e-14)
    assert decide(classifier, logits, activated=False).tolist() == wide.tolist()
    score = wide[0] - wide[1] if decision == "identity" else wanted[decision][0]
    np.testing.assert_allclose(relevance(classifier, logits), score, rtol=1e-14)


def test_a_gguf_file_with_a_classifier(tmp_path: Path) -> None:
    reader = gguf.GGUFReader(ROOT / "tests/fixtures/gguf/qwen3_bf16.gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen3")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub_type = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    writer.add_pooling_type(gguf.PoolingType.RANK)
    writer.add_classifier_output_labels(["yes", "no"])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    width = int(reader.get_field("qwen3.embedding_length").contents())  # type: ignore[union-attr]
    weight = RANDOM.standard_normal((2, width)).astype(np.float32)
    writer.add_tensor("cls.output.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with closing(open_source(tmp_path / "m.gguf")) as source:
        config = config_of(source)
        assert not config.generates
        assert config.classifier is not None
        found = read_classifier(source, config.classifier)
    assert (found.pooling, found.labels, found.relevant, found.decision) == (
        "last",
        ("yes", "no"),
        0,
        "softmax",
    )
    np.testing.assert_array_equal(found.layers[0].weight, weight)
