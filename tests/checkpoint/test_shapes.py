"""Factors present against the ranks that promise them."""

import pytest

from lillama.checkpoint.shapes import check_factors
from lillama.errors import InputError

SHAPES = {f"m{i}": (6, 4) for i in range(8)}
FITTING = {
    f"m{i}.{key}": shape for i in range(8) for key, shape in (("lr_A", (2, 4)), ("lr_B", (6, 2)))
}
ALL = dict.fromkeys(SHAPES, 2)


def test_check_factors_that_fit():
    check_factors({**FITTING, "norm.weight": (9,)}, ALL, SHAPES)
    check_factors({**FITTING, "m8.lr_W": (3, 5)}, ALL, {**SHAPES, "m8": (3, 5)})


def test_check_factors_in_the_pivot_gauge():
    """Of the embeddings it is the columns that have an order."""
    shapes, ranks = {"m": (6, 4), "e": (6, 4)}, {"m": 2, "e": 3}
    fitting = {"m.lr_A": (2, 4), "m.lr_C": (4, 2), "m.lr_pivots": (6,)}
    fitting |= {"e.lr_B": (6, 3), "e.lr_C": (1, 3), "e.lr_pivots": (4,)}
    check_factors(fitting, ranks, shapes, "pivot", "e")
    with pytest.raises(InputError, match=r"missing factors: e\.lr_A; unexpected factors: e\.lr_B"):
        check_factors(fitting, ranks, shapes, "pivot", "another")
    with pytest.raises(InputError, match="missing factors: m.lr_B, e.lr_A;"):
        check_factors(fitting, ranks, shapes, "plain", "e")


def test_check_factors_matrix_without_a_rank_is_dense():
    shapes = {**SHAPES, "m8": (3, 5)}
    with pytest.raises(InputError, match=r"missing factors: m8\.lr_W$"):
        check_factors(FITTING, ALL, shapes)
    with pytest.raises(InputError, match=r"mis-shaped factors: m8\.lr_W \[5, 3\] instead of"):
        check_factors({**FITTING, "m8.lr_W": (5, 3)}, ALL, shapes)
    with pytest.raises(InputError, match=r"unexpected factors: m7\.lr_W$"):
        check_factors({**FITTING, "m7.lr_W": (6, 4)}, ALL, SHAPES)


@pytest.mark.parametrize("name", ["m3.lr_A", "m3.lr_B"])
def test_check_factors_missing(name):
    present = {key: shape for key, shape in FITTING.items() if key != name}
    with pytest.raises(InputError, match=f"missing factors: {name}$"):
        check_factors(present, ALL, SHAPES)


def test_check_factors_unexpected():
    with pytest.raises(InputError, match=r"unexpected factors: other\.lr_A$"):
        check_factors({**FITTING, "other.lr_A": (2, 4)}, ALL, SHAPES)


@pytest.mark.parametrize("shape", [(3, 4), (2, 5), (4, 2), (8,)])
def test_check_factors_mis_shaped(shape):
    got = str(list(shape)).replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(
        InputError, match=rf"mis-shaped factors: m1\.lr_A {got} instead of \[2, 4\]"
    ):
        check_factors({**FITTING, "m1.lr_A": shape}, ALL, SHAPES)


def test_check_factors_names_five_of_each_and_counts_the_rest():
    with pytest.raises(InputError) as caught:
        check_factors({"x.lr_B": (1, 1)}, ALL, SHAPES)
    text = str(caught.value)
    assert text.count("lr_A") + text.count("lr_B") == 6
    assert "and 11 more" in text and "unexpected factors: x.lr_B" in text


def test_check_factors_of_a_matrix_that_is_dense_as_well():
    names = {"a.lr_A": (2, 8), "a.lr_B": (8, 2), "a.weight": (8, 8), "b.weight": (8, 8)}
    with pytest.raises(InputError, match="dense tensors of factorised matrices: a.weight$"):
        check_factors(names, {"a": 2}, {"a": (8, 8)}, sentinel="b.weight")
    check_factors(names, {"a": 2}, {"a": (8, 8)}, sentinel="a.weight")
