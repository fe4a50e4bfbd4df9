"""The measure of closeness must fail where it should."""

import pytest
import torch

from stretto.testing.close import assert_close, distance

REF = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def test_float64_is_relative_to_the_largest_entry():
    assert_close(REF + 1e-12, REF, REF)
    assert_close(1e6 * REF + 1e-7, REF, 1e6 * REF)
    with pytest.raises(AssertionError, match=r"out: error 3e-12 is 1\.5 times the 2e-12"):
        assert_close(REF + 3e-12, REF, REF, what="out")


def test_allows_twice_the_error_of_the_plain_computation():
    base = REF.float() + 1e-3
    assert_close(REF.float() + 1.9e-3, base, REF)
    with pytest.raises(AssertionError, match="float32 allows"):
        assert_close(REF.float() + 2.1e-3, base, REF)


def test_an_exact_plain_computation_leaves_the_rounding_of_the_dtype():
    x = REF.to(torch.bfloat16)
    assert_close(x, x, REF)
    with pytest.raises(AssertionError):
        assert_close(x * 1.02, x, REF)


def test_equal_infinities_are_close_and_nothing_else_is_to_them():
    inf = torch.tensor([float("-inf"), 1.0], dtype=torch.float64)
    assert_close(inf, inf, inf)
    for other in (torch.tensor([0.0, 1.0]), torch.tensor([float("inf"), 1.0])):
        with pytest.raises(AssertionError):
            assert_close(other.double(), inf, inf)


def test_nan_is_never_close():
    nan = torch.full((2,), float("nan"), dtype=torch.float64)
    assert distance(nan, nan) == float("inf")
    with pytest.raises(AssertionError):
        assert_close(nan, nan, nan)


def test_shapes_must_agree_and_empty_is_close():
    with pytest.raises(AssertionError, match=r"shape \(3,\) against \(1, 3\)"):
        assert_close(REF, REF, REF[None])
    assert_close(REF[:0], REF[:0], REF[:0])
