from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paqdetr.data.annotations import Ids, Texts


@given(st.lists(st.text(alphabet=st.characters())))
def test_texts(texts: list[str]) -> None:
    column = Texts(texts)
    assert list(column) == texts and column == texts and len(column) == len(texts)
    assert column[1:] == texts[1:] and pickle.loads(pickle.dumps(column)) == texts
    if texts:
        assert column[-1] == texts[-1] and column.index(texts[-1]) == texts.index(texts[-1])
    with pytest.raises(IndexError):
        column[len(texts)]


@given(st.lists(st.integers()) | st.lists(st.integers() | st.text()))
def test_ids_come_out_as_what_they_were(ids: list[int | str]) -> None:
    column = Ids(ids)
    assert list(column) == ids and column == ids and len(column) == len(ids)
    assert [type(own) for own in column] == [type(own) for own in ids]
    assert column[::-1] == ids[::-1] and pickle.loads(pickle.dumps(column)) == ids
    with pytest.raises(IndexError):
        column[len(ids)]


def test_how_they_are_shown() -> None:
    assert repr(Texts(["a"])) == "Texts(['a'])" and repr(Texts(["a"] * 10)) == "<10 texts>"
    assert repr(Ids([1, "1"])) == "Ids([1, '1'])" and repr(Ids(range(10))) == "<10 ids>"
    assert Texts(["1"]) != Ids([1]) and Texts([]) != 0
