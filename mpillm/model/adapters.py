"""Adapters beside a model: low-rank additions to its matrices, which each row of a step has or has not (LoRA)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mpillm.errors import JobError, ModelError
from mpillm.kernels.adapted import LowRank
from mpillm.kernels.types import BlockType
from mpillm.model.batch import NO_ADAPTER, Ints
from mpillm.model.config import ModelConfig
from mpillm.model.families import family_of
from mpillm.model.layers.rank import Floats, LowRanks
from mpillm.model.opening import config_of
from mpillm.partition.grid import Place, stage_layers
from mpillm.weights.formats.adapter import AdapterFiles, Factors
from mpillm.weights.formats.extent import Extent
from mpillm.weights.formats.matrices import place
from mpillm.weights.inventory import TensorSpec, tensor_name
from mpillm.weights.page import Matrix
from mpillm.weights.roles import ROLES, Key
from mpillm.weights.source import Source


class _Addition(NamedTuple):
    """The change of a matrix by an adapter: `scale` b a."""

    a: Extent
    b: Extent
    scale: float


class Adapters:
    """The adapters of a job, in the order of their names."""

    def __init__(self, folders: Mapping[str, str], source: Source, config: ModelConfig) -> None:
        """Open them; ModelError or JobError says which one cannot be used with this model, and why."""
        self._config = config
        self.files: dict[str, AdapterFiles] = {}
        self._additions: list[dict[Key, _Addition]] = []
        specs = _adaptable(config) if folders else {}
        try:
            for name, folder in sorted(folders.items()):
                if name in (source.path.name, source.path.stem):
                    raise JobError(f"The adapter {name!r} has the name of the model; give it another name.")
                self.files[name] = files = _open(name, folder, source)
                self._additions.append(_additions(files, specs))
        except BaseException:
            self.close()
            raise
        self._specs = {key: specs[key] for additions in self._additions for key in additions}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters in requests; number 1 is the first."""
        return tuple(self.files)

    def nbytes(self, place: Place) -> int:
        """Return bytes that a rank holds of all of them, as float32."""
        values = 0
        for additions in self._additions:
            for key in self._here(additions, place):
                rows, cols, _ = self._specs[key].slices(place)
                values += additions[key].a.n * (len(rows) + len(cols))
        return 4 * values

    def row_nbytes(self, place: Place) -> int:
        """Return bytes that a row takes at most besides the model's: its copy, and what is added to a product."""
        widest = 0
        for additions in self._additions:
            for key in self._here(additions, place):
                rows, cols, bounds = self._specs[key].slices(place)
                panels = len(bounds) - 1
                widest = max(widest, len(cols) + panels * (additions[key].a.n + len(rows)) + len(rows))
        return 4 * widest

    def load(self, place: Place) -> RankAdapters:
        """Load the part of the adapters of a rank; ModelError if a value is not finite."""
        return RankAdapters([self._load(additions, place) for additions in self._additions])

    def close(self) -> None:
        """Let go of the files."""
        for files in self.files.values():
            files.close()

    def _here(self, additions: Mapping[Key, _Addition], place: Place) -> list[Key]:
        layers = stage_layers(self._config.n_layers, place)
        return [key for key in additions if key.layer in layers]

    def _load(self, additions: Mapping[Key, _Addition], place: Place) -> dict[Key, tuple[Matrix, Matrix]]:
        found: dict[Key, tuple[Matrix, Matrix]] = {}
        for key in self._here(additions, place):
            a, b, scale = additions[key]
            rows, cols, bounds = self._specs[key].slices(place)
            down = np.ascontiguousarray(_values(a, range(a.n))[:, cols.start : cols.stop])
            found[key] = (
                _matrix(down, bounds),
                _matrix(_values(b, rows) * np.float32(scale), (0, b.k)),
            )
            a.release()
            b.release()
        return found


@contextmanager
def with_adapters(folders: Mapping[str, str], source: Source) -> Iterator[ModelConfig]:
    """The configuration of a source's model that counts these adapters, which are open in the `with` block."""
    config = config_of(source)
    with closing(Adapters(folders, source, config)) as adapters:
        yield replace(config, adapters=adapters)


class RankAdapters:
    """The adapters' factors on a rank, cut as the matrices are to which they add."""

    def __init__(self, adapters: Sequence[Mapping[Key, tuple[Matrix, Matrix]]]) -> None:
        self._adapters = adapters

    def of_step(self, numbers: Ints | None) -> LowRanks:
        """Return the low-rank products to add in a step; `numbers` [m] has the adapter of each row."""
        found: dict[Key, list[LowRank]] = {}
        if numbers is not None:
            for number in np.unique(numbers[numbers != NO_ADAPTER]).tolist():
                rows = np.flatnonzero(numbers == number).astype(np.int32)
                for key, (a, b) in self._adapters[number - 1].items():
                    found.setdefault(key, []).append(LowRank(rows, a, b))
        return found


def _open(name: str, folder: str, source: Source) -> AdapterFiles:
    path = Path(folder).expanduser()
    if not path.exists():
        raise JobError(f"The adapter {name!r} is {folder}, which does not exist.")
    family = family_of(source.config, str(source.path))[0]
    if path.is_dir():
        from mpillm.weights.formats.peft import open_peft

        return open_peft(path, family, source.config)
    from mpillm.weights.formats.gguf_adapter import open_gguf_adapter

    return open_gguf_adapter(path, family, source.config)


def _adaptable(config: ModelConfig) -> dict[Key, TensorSpec]:
    """Return the matrices of a model to which adapters may add."""
    return {
        tensor.key: tensor
        for number, layer in enumerate(config.layers)
        for page in config.pages(number)
        for tensor in page.tensors
        if any(tensor.key.role in part.adaptable for part in layer.parts)
    }


def _additions(files: AdapterFiles, specs: Mapping[Key, TensorSpec]) -> dict[Key, _Addition]:
    """Return the change of each matrix by an adapter; ModelError for another tensor, or a matrix without adapters."""
    found: dict[Key, _Addition] = {}
    for factors in files.factors:
        if ROLES[factors.parsed.roles[0]].ndim != 2:
            raise ModelError(f"{files.path} adapts {factors.name[:80]!r}, which is not a matrix.")
        for key, b in _parts(factors):
            spec = specs.get(key)
            if spec is None:
                raise ModelError(f"{files.path} adapts {factors.name[:80]!r}: {_why_not(key, specs)}.")
            shape = b.shape[0], factors.a.k
            if shape != spec.shape:
                raise ModelError(
                    f"{files.path} adapts {factors.name[:80]!r} as a matrix of shape {list(shape)}, but "
                    f"{tensor_name(key)} has shape {list(spec.shape)}: the adapter was made for another model."
                )
            if key in found:
                raise ModelError(f"{files.path} adapts {tensor_name(key)} twice.")
            found[key] = _Addition(factors.a, b, factors.scale)
    return found


def _parts(factors: Factors) -> list[tuple[Key, Extent]]:
    """Return the rows of b that belong to each matrix of a tensor that holds several."""
    parsed = factors.parsed._replace(transposed=False)  # only the model's own may lie so
    if parsed.stacked:
        return [(Key(parsed.roles[0], parsed.layer, 0), factors.b)]
    return place(parsed, factors.b, factors.b.shape, factors.groups)


def _why_not(key: Key, specs: Mapping[Key, TensorSpec]) -> str:
    if key.expert >= 0:
        return "adapters of experts are not supported"
    if key.layer < 0:
        return "adapters of embeddings and of the LM head are not supported"
    if key.layer > max((known.layer for known in specs), default=math.inf):
        return f"the model has no layer {key.layer}; the adapter was made for another one"
    return f"adapters of {tensor_name(key)} are not supported in this model"


def _values(extent: Extent, rows: range) -> Floats:
    """Return rows as float32; ModelError if one is not finite."""
    values = extent.stored.decode(np.ascontiguousarray(extent.rows(rows)), extent.k, threads=1)
    if not np.isfinite(values).all():
        raise ModelError(f"{extent.file.path}: tensor {extent.name} has values that are not finite.")
    return values


def _matrix(values: Floats, bounds: Sequence[int]) -> Matrix:
    """Values [n, k] as products take them."""
    n, k = values.shape
    data = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
    return Matrix(BlockType.F32, n, k, np.array(bounds, np.int32), data, row_bytes=4 * k)
