"""One NaN or infinity costs one window and is named, wherever it comes from."""

from __future__ import annotations

import pytest

from recipes.fault_matrix import Case, Outcome, all_cases, run

CASES = list(all_cases())


def describe(case: Case) -> str:
    return "-".join(str(value) for value in vars(case).values())


@pytest.mark.parametrize("case", CASES[::101], ids=describe)
def test_the_bad_window_is_skipped_and_its_origin_named(case: Case) -> None:
    assert run(case, guarded=True) == Outcome(finite=True, contained=True, named=True)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_the_bad_window_is_skipped_and_its_origin_named_throughout_the_matrix(part: int) -> None:
    failed = [case for case in CASES[part * 5 :: 100] if run(case, guarded=True) != Outcome(True, True, True)]
    assert failed == []


@pytest.mark.parametrize("case", CASES[::509], ids=describe)
def test_the_trainer_alone_ends_with_weights_that_are_not_finite(case: Case) -> None:
    assert not run(case, guarded=False).finite
