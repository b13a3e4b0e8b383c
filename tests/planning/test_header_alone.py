"""A plan from the header of a GGUF file, whose weights are not there."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from mpillm.errors import ModelError
from mpillm.model.opening import open_source
from mpillm.planning import plan
from mpillm.planning.machines import Machines
from mpillm.spec import Spec
from mpillm.weights.formats.gguf_header import read_header
from mpillm.weights.io.mapped import MappedFile

GGUF = Path(__file__).parent.parent / "fixtures" / "gguf"
FILES = sorted(file for file in GGUF.glob("*.gguf") if "-of-" not in file.name and "lora" not in file.name)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_header_of_a_gguf_file_is_enough_for_a_plan(path: Path, tmp_path: Path) -> None:
    file = MappedFile(path)
    begin = min(tensor.offset for tensor in read_header(file).tensors.values())
    (alone := tmp_path / path.name).write_bytes(file.view(0, begin).tobytes())
    file.close()
    with pytest.raises(ModelError, match="reaches beyond its end"):
        open_source(alone)
    made = [
        plan.make(Spec(model=str(model), input="none.jsonl", output="out"), 2, Machines([1, 1], [2**33] * 2))
        for model in (path, alone)
    ]
    of_file, of_header = (msgspec.to_builtins(one) for one in made)
    assert of_file | {"model": None} == of_header | {"model": None}
