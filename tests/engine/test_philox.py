"""Our Philox is NumPy's."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mpillm.engine.philox import uniform

words = st.integers(0, 2**64 - 1)


@given(st.tuples(words, words), st.integers(0, 2**32))
def test_numbers_are_numpys(key: tuple[int, int], counter: int) -> None:
    theirs = np.random.Generator(np.random.Philox(key=np.array(key, np.uint64), counter=counter))
    assert uniform(key, counter) == theirs.random()
