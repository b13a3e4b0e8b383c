"""Find the task of a model's last hidden states from the name of its class: text, vectors, or classes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

from mpillm.model.fields import Fields
from mpillm.model.pooled import ClassifierSpec, Decision, DenseSpec

Task = Literal["generate", "embed", "classify"]

SUFFIXES: Mapping[str, Task] = {
    "ForCausalLM": "generate",
    "LMHeadModel": "generate",
    "ForSequenceClassification": "classify",
    "ForMaskedLM": "embed",  # encoders
    "Model": "embed",
}
_DECISIONS: Mapping[str, Decision] = {
    "regression": "identity",
    "single_label_classification": "softmax",
    "multi_label_classification": "sigmoid",
}
_ACTIVATIONS: Mapping[str, Decision] = {"Sigmoid": "sigmoid", "Identity": "identity", "Softmax": "softmax"}


def split_task(named: str, known: Collection[str]) -> tuple[str, Task] | None:
    """Return the class among those that are `known` which computes the layers of the class `named`, and its task.

    Transformers builds the classes of all tasks around the same layers (Qwen3Model, Qwen3ForCausalLM, ...).
    """
    if named in known:
        return named, SUFFIXES.get(next((end for end in SUFFIXES if named.endswith(end)), ""), "generate")
    for suffix, task in SUFFIXES.items():
        stem = named.removesuffix(suffix)
        if stem == named:
            continue
        for base in (stem, stem.removesuffix("Text")):
            for end in SUFFIXES:
                if base + end in known:
                    return base + end, task
    return None


def read_labels(fields: Fields) -> tuple[str, ...]:
    """Return the names of a classifier's labels; transformers leaves them away where there are two without a name."""
    names = fields.raw("id2label")
    count = fields.optional_integer("num_labels", 1, 2**20)
    fields.read |= {"label2id"}
    if names is None:
        return tuple(f"LABEL_{index}" for index in range(2 if count is None else count))
    if not isinstance(names, Mapping) or set(map(str, names)) != {str(index) for index in range(len(names))}:
        raise fields.fail("id2label", "but must name the labels 0, 1, ... of a classifier")
    by_number = {int(index): str(name) for index, name in names.items()}
    return tuple(by_number[index] for index in range(len(names)))


def read_decision(fields: Fields, labels: int) -> Decision:
    """Return the activation for logits: that of problem_type, or the one that Sentence Transformers wrote down.

    Else they are probabilities of labels that exclude each other, or of the only one, as in vLLM.
    """
    kind = fields.raw("problem_type")
    trained = fields.raw("sentence_transformers")
    inner = trained.get("activation_fn") if isinstance(trained, Mapping) else None
    named: Any = inner or fields.raw("sbert_ce_default_activation_function")
    if kind is not None:
        if kind not in _DECISIONS:
            raise fields.fail("problem_type", f"but must be one of {', '.join(_DECISIONS)}")
        return _DECISIONS[kind]
    if named is not None:
        function = str(named).rpartition(".")[2]
        if function not in _ACTIVATIONS:
            raise fields.fail(
                "sentence_transformers" if inner else "sbert_ce_default_activation_function",
                f"but the activations that are supported are {', '.join(_ACTIVATIONS)}",
            )
        return _ACTIVATIONS[function]
    return "sigmoid" if labels == 1 else "softmax"


def last_token_classifier(fields: Fields) -> ClassifierSpec:
    """Return the classifier that decoders have: a matrix, of the last token's hidden state."""
    labels = read_labels(fields)
    return ClassifierSpec(
        "last", (DenseSpec("classifier", len(labels)),), labels, read_decision(fields, len(labels))
    )
