"""Adapters of PEFT: directories with adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpillm.errors import ModelError
from mpillm.weights.formats.adapter import AdapterFiles, Factors, pairs_of
from mpillm.weights.formats.extent import Extent
from mpillm.weights.formats.gguf_family import GgufFamily
from mpillm.weights.formats.heads import row_groups
from mpillm.weights.formats.hf import read_json
from mpillm.weights.formats.safetensors import SafetensorsTensor, read_header
from mpillm.weights.formats.stored import OWN
from mpillm.weights.io.mapped import MappedFile

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(\.default)?\.weight")

# Keys that ask for something else than two factors beside some matrices, unless they have one of these values.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,),
    "modules_to_save": ([],),
    "bias": ("none",),
    "lora_bias": (False,),
    "layer_replication": ([],),
    "trainable_token_indices": ([], {}),
    "target_parameters": ([],),
    "use_qalora": (False,),
    "use_bdlora": (False,),
    "alora_invocation_tokens": ([],),
    "arrow_config": (),
    "kasa_config": (),
    "monteclora_config": (),
    "velora_config": (),
}
# Beginnings that leave the model's own matrices as they are.
_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")


def open_peft(path: Path, family: GgufFamily, config: dict[str, Any]) -> AdapterFiles:
    """Return the adapter in a directory, for a model of `family` with this configuration; ModelError if it is none."""
    said = _read_config(path)
    if not os.path.exists(path / WEIGHTS):
        raise ModelError(f"{path} has no {WEIGHTS}; only adapters in safetensors files can be used.")
    file = MappedFile(path / WEIGHTS)
    try:
        groups = row_groups(config, family)
        factors = []
        for module, (a, b) in _pairs(file).items():
            parsed = family.names.parse_hf(f"{module}.weight")
            if parsed is None:
                raise ModelError(
                    f"{file.path} adapts {module[:80]!r}, which the model does not have; the adapter was made for "
                    "another one."
                )
            scale = _scale(said, module, a.shape[0], file)
            factors.append(Factors(module, parsed, a, b, scale, groups))
        return AdapterFiles(path, (path / CONFIG, path / WEIGHTS), file, factors)
    except BaseException:
        file.close()
        raise


def _read_config(path: Path) -> dict[str, Any]:
    """Read adapter_config.json; ModelError if something in it is not supported."""
    if not os.path.exists(path / CONFIG):
        raise ModelError(f"{path} has no {CONFIG}: it is not an adapter of PEFT.")
    said = read_json(path / CONFIG)
    kind = said.get("peft_type")
    if kind != "LORA":
        raise ModelError(f"{path / CONFIG}: peft_type is {str(kind)[:40]!r}; LORA is supported.")
    for key, neutral in _REFUSED.items():
        if (value := said.get(key)) is not None and value not in neutral:
            raise ModelError(f"{path / CONFIG}: {key} = {str(value)[:60]} is not supported.")
    begins = said.get("init_lora_weights")
    if begins not in _BEGINNINGS:
        raise ModelError(
            f"{path / CONFIG}: init_lora_weights = {str(begins)[:40]!r} changes the model's own weights, which is not "
            "supported; save the adapter converted to LoRA (path_initial_model_for_weight_conversion)."
        )
    return said


def _pairs(file: MappedFile) -> dict[str, tuple[Extent, Extent]]:
    """Return both factors of each module, by its name in the model; ModelError if a tensor is no such factor."""
    found: dict[str, dict[str, Extent]] = {}
    for name, tensor in read_header(file).items():
        match = _FACTOR.fullmatch(name)
        if match is None:
            raise ModelError(f"{file.path}: tensor {name[:80]!r} {_what_else(name)}.")
        module = match["module"].removeprefix(_PREFIX)
        found.setdefault(module, {})[match["factor"]] = _extent(file, name, tensor)
    return pairs_of(file, found)


def _what_else(name: str) -> str:
    """Return the message about a tensor that is no factor of a linear layer."""
    if "lora_embedding" in name:
        return "adapts embeddings, which is not supported"
    if "lora_magnitude_vector" in name:
        return "is DoRA's, which is not supported"
    return "is not a factor of a linear layer (lora_A, lora_B); others are not supported"


def _extent(file: MappedFile, name: str, tensor: SafetensorsTensor) -> Extent:
    if tensor.dtype not in {"F32", "F16", "BF16"}:
        raise ModelError(
            f"{file.path}: tensor {name} has dtype {tensor.dtype}; F32, F16 and BF16 are supported."
        )
    return Extent(file, name, tensor.offset, tensor.shape, OWN[tensor.dtype])


def _scale(said: Mapping[str, Any], module: str, rank: int, file: MappedFile) -> float:
    """lora_alpha / r, or with use_rslora lora_alpha / sqrt(r) (arXiv 2312.03732); both may differ between modules."""
    r = _of_module(said, "rank_pattern", module, said.get("r", 8))
    alpha = _of_module(said, "alpha_pattern", module, said.get("lora_alpha", 8))
    for key, value, kinds in (("r", r, (int,)), ("lora_alpha", alpha, (int, float))):
        if type(value) not in kinds or not math.isfinite(value):
            raise ModelError(f"{file.path.parent / CONFIG}: {key} is {str(value)[:40]} for {module[:80]!r}.")
    if r != rank:
        raise ModelError(
            f"{file.path}: the factors of {module[:80]!r} have rank {rank}, but {CONFIG} says {r}."
        )
    return float(alpha) / (math.sqrt(r) if said.get("use_rslora") is True else r)


def _of_module(said: Mapping[str, Any], key: str, module: str, usual: Any) -> Any:
    """Return the value of a table whose keys are regular expressions for the end of a module's name, as in PEFT."""
    table = said.get(key) or {}
    if not isinstance(table, Mapping):
        return None
    for pattern, value in table.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error:
            return None
    return usual
