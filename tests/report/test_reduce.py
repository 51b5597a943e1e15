import numpy as np

from hf_gradguard.judge import Stack
from hf_gradguard.report.reduce import cells, curve


def _norms(windows: int, layers: int) -> np.ndarray:
    random = np.random.default_rng(1)
    norms = np.exp(3 * random.standard_normal((windows, layers)))
    norms[random.random(norms.shape) < 0.2] = np.nan
    norms[random.random(norms.shape) < 0.2] = 0.0
    return norms


def test_each_cell_is_the_median_log_norm_of_its_updates_and_layers():
    norms = _norms(53, 17)
    found = cells(np.arange(1, 54), norms, np.zeros(53, bool), [Stack.of_depth(17)], rows=10, columns=5)

    # 53 windows in at most 10 blocks: 9 blocks of 6, the last of 5. 17 layers in at most 5: 5 of 4, the last of 1.
    assert found.first_step.tolist() == [1, 7, 13, 19, 25, 31, 37, 43, 49]
    assert found.last_step.tolist() == [6, 12, 18, 24, 30, 36, 42, 48, 53]
    assert [block[0] for block in found.layers] == [0, 4, 8, 12, 16]
    for row in range(9):
        for column in range(5):
            block = norms[6 * row : 6 * row + 6, 4 * column : 4 * column + 4]
            expected = np.exp(np.median(np.log(block[block > 0])))
            np.testing.assert_allclose(found.norms[row, column], expected, rtol=1e-5)


def test_a_block_of_layers_never_spans_two_stacks():
    stacks = [Stack("encoder", (0, 1, 2), ("a", "b", "c")), Stack("decoder", (3, 4, 5), ("d", "e", "f"))]
    found = cells(np.arange(4), _norms(4, 6), np.zeros(4, bool), stacks, rows=4, columns=3)

    assert found.layers == ((0, 1), (2,), (3, 4), (5,))


def test_cells_without_a_positive_norm_tell_zero_infinite_and_absent_apart():
    norms = np.ones((4, 4))
    norms[:, 1] = 0.0
    norms[:, 2] = np.nan
    norms[2] = np.nan
    norms[3, 0] = np.inf
    found = cells(np.arange(4), norms, np.array([False, False, True, True]), [Stack.of_depth(4)], rows=4, columns=4)

    nan, inf = np.nan, np.inf
    expected = [[1, 0, nan, 1], [1, 0, nan, 1], [inf, inf, nan, inf], [inf, 0, nan, 1]]
    np.testing.assert_array_equal(found.norms, expected)


def test_a_curve_keeps_the_median_and_the_extremes_of_what_is_finite():
    random = np.random.default_rng(2)
    values = random.standard_normal(1003)
    values[::7] = np.nan
    values[500] = np.inf
    found = curve(np.arange(1, 1004), values, points=100)

    assert len(found.middle) == 92  # blocks of 11, the last of 2
    for block in range(92):
        part = values[11 * block : 11 * block + 11]
        part = part[np.isfinite(part)]
        assert found.middle[block] == np.median(part)
        assert (found.low[block], found.high[block]) == (part.min(), part.max())
    assert (found.first_step[-1], found.last_step[-1]) == (1002, 1003)


def test_a_curve_of_nothing_finite_is_nan():
    assert np.isnan(curve(np.arange(3), np.full(3, np.nan), points=10).middle).all()
