"""A plan from the header of a GGUF file, whose weights are not there."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from mpillm.errors import ModelError
from mpillm.model.opening import open_source
from mpillm.planning import plan
from mpillm.planning.machines import Machines
from mpillm.planning.plan_text import as_text
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
    (part := tmp_path / f"part-{path.name}").write_bytes(file.view(0, file.size - 100).tobytes())
    file.close()
    with pytest.raises(ModelError, match="reaches beyond its end"):
        open_source(alone)
    made = [
        plan.make(Spec(model=str(model), input="none.jsonl", output="out"), 2, Machines([1, 1], [2**33] * 2))
        for model in (path, alone, part)
    ]
    assert [one.missing_nbytes > 0 for one in made] == [False, True, True]
    assert 0 < made[2].missing_nbytes <= 100 < made[1].missing_nbytes
    assert "are missing in the file" in as_text(made[1])
    assert "missing" not in as_text(made[0])
    of_file, *others = (msgspec.to_builtins(one) | {"model": None, "missing_nbytes": 0} for one in made)
    assert all(one == of_file for one in others)
