"""Hugging Face directories: config.json and one or several safetensors files."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mpillm.errors import ModelError
from mpillm.weights import names
from mpillm.weights.formats.extent import Extent, Made, Recipe
from mpillm.weights.formats.families import Families
from mpillm.weights.formats.heads import join_heads, row_groups, split_kv_b
from mpillm.weights.formats.matrices import add
from mpillm.weights.formats.quantised import QUANTIZATION, method_of
from mpillm.weights.formats.recipes import Plain, Raw, Transposed
from mpillm.weights.formats.safetensors import SafetensorsTensor, read_header
from mpillm.weights.formats.stored import OWN
from mpillm.weights.formats.tensors import TensorSource
from mpillm.weights.io.mapped import MappedFile
from mpillm.weights.roles import ROLES, Key

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_JSON = 64 * 2**20
COMPRESSION = "compression_config"  # how old files of compressed-tensors call quantization_config
# What the outer configuration of a model with several parts says of all of them.
OF_ALL = ("architectures", "tie_word_embeddings", QUANTIZATION, COMPRESSION)
MODELOPT = "hf_quant_config.json"
_LAYER = re.compile(r"(?:model\.)?layers\.(?P<layer>[0-9]{1,6})\.")


def open_hf(path: Path, families: Families, quantize: str) -> TensorSource:
    """Return the model in a directory with config.json; ModelError if it is not complete or not sound."""
    config, metadata = read_config(path)
    family = families.of_config(config, str(path))
    method = method_of(config.pop(QUANTIZATION, None), path)
    files = _files(path)
    if SINGLE not in files:
        metadata = (*metadata, path / INDEX)
    extents: dict[Key, Extent] = {}
    groups = row_groups(config, family)
    try:
        tensors = {
            name: Raw(file, name, *tensor)
            for name, (file, tensor) in _tensors(path, files).items()
            if not names.ignored_hf(name) and not _predicts_further(name, config)
        }
        for name, recipe in method.take(tensors):
            _add_made(extents, name, recipe, family.names, groups)
        for raw in tensors.values():
            _add(extents, raw, family.names, groups)
        split_kv_b(extents, config, path)
        join_heads(extents, path)
        if config.get("tie_word_embeddings", family.tied) is True:
            _tie(extents)
        return TensorSource(path, files.values(), metadata, extents, config, path, quantize)
    except BaseException:
        for file in files.values():
            file.close()
        raise


def read_config(path: Path) -> tuple[dict[str, Any], tuple[Path, ...]]:
    """Return the content of config.json and the files beside it, and the paths that were read."""
    config, files = of_text(read_json(path / "config.json")), [path / "config.json"]
    if QUANTIZATION not in config and COMPRESSION in config:
        config[QUANTIZATION] = config.pop(COMPRESSION)
    elif QUANTIZATION not in config and os.path.exists(path / MODELOPT):
        # How ModelOpt quantised a checkpoint, which older ones have in a file of its own.
        found = read_json(path / MODELOPT).get("quantization")
        config[QUANTIZATION] = {"quant_method": "modelopt", **(found if isinstance(found, dict) else {})}
        files.append(path / MODELOPT)
    if os.path.exists(generation := path / "generation_config.json"):
        # What ends a text is said there by those who publish models; config.json often has less.
        eos = read_json(generation).get("eos_token_id")
        if eos is not None:
            config["eos_token_id"] = eos
        files.append(generation)
    return config, tuple(files)


def of_text(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of the text model in one that has others beside it, for images or sounds.

    Its architecture is the outer one, its model_type that of the text model.
    """
    text = config.get("text_config")
    if not isinstance(text, dict):
        return config
    outer = {key: value for key, value in config.items() if key in OF_ALL and value is not None}
    return {"model_type": config.get("model_type"), **text, **outer}


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file; ModelError if it is anything else."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise ModelError(
                f"{path} is larger than {MAX_JSON >> 20} MiB, the maximum of such a file; fetch it again."
            )
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{path.parent} has no {path.name}: it is not a complete Hugging Face model."
        ) from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError):
        raise ModelError(f"{path} is not valid JSON; fetch the model again.") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object; fetch the model again.")
    return value


def _files(path: Path) -> dict[str, MappedFile]:
    """Return the weight files by name: the single one if it is there, as in transformers, else the index's."""
    if os.path.exists(path / SINGLE):
        return {SINGLE: MappedFile(path / SINGLE)}
    if not os.path.exists(path / INDEX):
        raise ModelError(
            f"{path} has neither {SINGLE} nor {INDEX}; only checkpoints in safetensors files can be run."
        )
    files: dict[str, MappedFile] = {}
    for name in sorted(set(_weight_map(path).values())):
        if not os.path.exists(path / name):
            raise ModelError(f"{path / INDEX} names {name}, which is missing; fetch the model again.")
        files[name] = MappedFile(path / name)
    return files


def _weight_map(path: Path) -> dict[str, str]:
    index = path / INDEX
    entries = read_json(index).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise ModelError(f"{index} has no weight_map; fetch the model again.")
    for name, shard in entries.items():
        if not isinstance(shard, str) or shard in {"", ".", ".."} or PurePosixPath(shard).name != shard:
            raise ModelError(
                f"{index} puts {name[:80]!r} into {str(shard)[:80]!r}, which is not a file of {path}."
            )
        if "\\" in shard or "\0" in shard or not shard.endswith(".safetensors"):
            raise ModelError(
                f"{index} puts {name[:80]!r} into {shard[:80]!r}, which is not a safetensors file."
            )
    return entries


def _tensors(path: Path, files: dict[str, MappedFile]) -> dict[str, tuple[MappedFile, SafetensorsTensor]]:
    """Return all tensors with their files; with an index, those that it names, where it says they are."""
    headers = {name: read_header(file) for name, file in files.items()}
    if SINGLE in files:
        return {name: (files[SINGLE], tensor) for name, tensor in headers[SINGLE].items()}
    found = {}
    for name, shard in _weight_map(path).items():
        if name not in headers[shard]:
            raise ModelError(
                f"{path / INDEX} puts tensor {name[:80]!r} into {shard}, which does not contain it."
            )
        found[name] = (files[shard], headers[shard][name])
    return found


def _predicts_further(name: str, config: dict[str, Any]) -> bool:
    """Return whether a tensor is of a layer behind the model's own, which predicts further tokens (GLM, DeepSeek)."""
    own, further = config.get("num_hidden_layers"), config.get("num_nextn_predict_layers")
    found = _LAYER.match(name)
    if found is None or type(own) is not int or type(further) is not int:
        return False
    return own <= int(found["layer"]) < own + further


def _add(extents: dict[Key, Extent], raw: Raw, own: names.Names, groups: names.RowGroups) -> None:
    """A tensor of floats."""
    parsed = _parsed(raw.name, raw.file, own)
    if not parsed.roles:  # nobody reads it
        return
    if raw.dtype not in {"F32", "F16", "BF16"}:
        raise ModelError(
            f"{raw.file.path}: tensor {raw.name} has dtype {raw.dtype}; F32, F16 and BF16 are supported."
        )
    if parsed.transposed and len(raw.shape) > 1:
        recipe = Plain(raw) if ROLES[parsed.roles[0]].ndim == 1 else Transposed(raw)
        _add_made(extents, raw.name, recipe, own, groups)
        return
    add(extents, parsed, Extent(raw.file, raw.name, raw.offset, raw.shape, OWN[raw.dtype]), groups)


def _add_made(
    extents: dict[Key, Extent], name: str, recipe: Recipe, own: names.Names, groups: names.RowGroups
) -> None:
    """A tensor that is made of others."""
    file = next(recipe.lies())[0]
    parsed = _parsed(name, file, own)
    if parsed.roles:
        add(extents, parsed, Made(file, name, 0, recipe.shape, recipe.stored, recipe=recipe), groups)


def _parsed(name: str, file: MappedFile, own: names.Names) -> names.Parsed:
    parsed = own.parse_hf(name)
    if parsed is None:
        raise ModelError(f"{file.path}: tensor {name[:80]!r} belongs to no architecture that is supported.")
    return parsed


def _tie(extents: dict[Key, Extent]) -> None:
    """Head and embedding are one tensor in tied models, under either name; if both are there, both count."""
    embed, head = Key("embed"), Key("head")
    for absent, present in ((head, embed), (embed, head)):
        if absent not in extents and present in extents:
            extents[absent] = extents[present]
