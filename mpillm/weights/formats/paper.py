"""A model on paper: its configuration alone, for plans. Its tensors have the types that the configuration says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mpillm.errors import ModelError
from mpillm.kernels.types import BlockType
from mpillm.partition.grid import Place
from mpillm.weights.formats.delivered import QUANTIZE
from mpillm.weights.formats.loaders import LOADING_NBYTES
from mpillm.weights.formats.quantised import QUANTIZATION
from mpillm.weights.inventory import Inventory, PageSpec, all_tensors
from mpillm.weights.plan import PagePlan, PageTensor, page_name, plan_entries
from mpillm.weights.roles import ROLES, Key
from mpillm.weights.source import TensorInfo
from mpillm.weights.text_files import TokenizerSource

DTYPES = {"bfloat16": BlockType.BF16, "float16": BlockType.F16, "float32": BlockType.F32}


class PaperSource:
    """A `Source` without weights: what asks for their values gets a ModelError."""

    files: tuple[Path, ...] = ()
    files_read_as_stored: tuple[Path, ...] = ()
    loading_nbytes = LOADING_NBYTES

    def __init__(self, path: Path, config: dict[str, Any], model: Inventory, quantize: str) -> None:
        """`model` is what the family reads in `config`; `path` the directory where that lies.

        ModelError if the checkpoint's weights are quantised: files say how each tensor is.
        """
        if config.get(QUANTIZATION):
            raise ModelError(
                f"{path} has quantised weights, whose types only the files say; pull the model to plan with it."
            )
        self.path, self.config = path, config
        self.tokenizer: TokenizerSource = path
        dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
        self._stored = DTYPES.get(str(dtype), BlockType.BF16)
        self._quantize = QUANTIZE[quantize]
        self.tensors: Mapping[Key, TensorInfo] = {
            tensor.key: self._info(tensor.key, tensor.shape) for tensor in all_tensors(model)
        }

    def _info(self, key: Key, shape: tuple[int, ...]) -> TensorInfo:
        role, kind = ROLES[key.role], self._stored
        if len(shape) == 1 or (role.exact and kind is BlockType.BF16):
            kind = BlockType.F32
        elif role.quantisable and self._quantize is not None:
            kind = self._quantize
        nbytes = shape[0] * self._stored.row_bytes(shape[-1]) if len(shape) == 2 else 4 * shape[0]
        return TensorInfo(shape, kind, self._stored.name, nbytes)

    def plan(self, page: PageSpec, model: Inventory, place: Place) -> PagePlan:
        """Return the page plan of a rank."""
        entries, nbytes = plan_entries(page.tensors, place, lambda key: self.tensors[key].type)
        name = page_name(page.kind, page.layer, page.expert)
        return PagePlan(name, entries, nbytes, page.layer, page.kind, expert=page.expert)

    def plan_experts(self, pages: Sequence[PageSpec], model: Inventory, place: Place) -> list[PagePlan]:
        """Return the page plan of a rank for each of a layer's experts."""
        return [self.plan(page, model, place) for page in pages]

    def extents(self) -> Iterator[tuple[Path, int, int]]:
        """None: there are no files."""
        return iter(())

    def in_file(self, entry: PageTensor) -> bool:
        """Whole rows of floats can."""
        whole = len(entry.cols) == self.tensors[entry.key].shape[-1]
        return entry.type.block == 1 and bool(entry.bounds) and whole

    def open_loader(self, *_: Any) -> NoReturn:
        """There is nothing to load."""
        self._refuse()

    def read_f32(self, *_: Any) -> NoReturn:
        """There is nothing to read."""
        self._refuse()

    def floats(self, *_: Any) -> NoReturn:
        """There is nothing to read."""
        self._refuse()

    def close(self) -> None:
        """Do nothing: no file is open."""

    def _refuse(self) -> NoReturn:
        raise ModelError(f"{self.path} has a configuration but no weights; pull the model.")
