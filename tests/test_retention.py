"""Hand-computed matrices; the sums are in the comments."""

import numpy as np
import pytest

from perdure import retention

NAN = float("nan")

# Three skills a, b, c taught in rows 1, 2, 3.
#            a     b     c
MATRIX = [[0.10, 0.20, 0.00],
          [0.90, 0.30, 0.10],
          [0.80, 0.70, 0.20],
          [0.60, 0.80, 0.50]]  # fmt: skip
LEARNED = [1, 2, 3]


def test_average_accuracy_is_the_mean_of_the_last_row():
    assert retention.average_accuracy(MATRIX) == pytest.approx(1.9 / 3)  # (0.6 + 0.8 + 0.5) / 3


def test_when_learned_is_the_diagonal_and_final_the_last_row():
    np.testing.assert_allclose(retention.accuracy_when_learned(MATRIX, LEARNED), [0.9, 0.7, 0.5])
    np.testing.assert_allclose(retention.final_accuracy(MATRIX), [0.6, 0.8, 0.5])


def test_forgetting_is_signed_and_improvement_is_negative():
    # a: 0.9 - 0.6, b: 0.7 - 0.8 (improved), c: 0.5 - 0.5
    np.testing.assert_allclose(retention.forgetting(MATRIX, LEARNED), [0.3, -0.1, 0.0], atol=1e-12)


def test_max_forgetting_is_from_the_best_and_never_negative():
    # a: max(.9, .8, .6) - .6, b: max(.7, .8) - .8, c: .5 - .5
    np.testing.assert_allclose(retention.max_forgetting(MATRIX, LEARNED), [0.3, 0.0, 0.0], atol=1e-12)
    # A best in between: a reaches .95 in row 2, so .95 - .6, while signed forgetting is .9 - .6.
    peak = np.array(MATRIX)
    peak[2, 0] = 0.95
    assert retention.max_forgetting(peak, LEARNED)[0] == pytest.approx(0.35)
    assert retention.forgetting(peak, LEARNED)[0] == pytest.approx(0.3)


def test_max_forgetting_ignores_what_the_base_knew_before_the_skill_was_taught():
    assert retention.max_forgetting([[0.9], [0.5]], [1])[0] == 0.0


def test_backward_transfer_leaves_out_the_last_skill():
    # ((0.6 - 0.9) + (0.8 - 0.7)) / 2
    assert retention.backward_transfer(MATRIX, LEARNED) == pytest.approx(-0.1)


def test_forward_transfer_compares_the_row_before_teaching_with_the_base():
    # b: R[1] - R[0] = 0.3 - 0.2, c: R[2] - R[0] = 0.2 - 0.0; mean 0.15. a is taught first and has none.
    assert retention.forward_transfer(MATRIX, LEARNED) == pytest.approx(0.15)


def test_retention_is_final_over_learned():
    np.testing.assert_allclose(retention.retention(MATRIX, LEARNED), [2 / 3, 8 / 7, 1.0])
    assert retention.mean_retention(MATRIX, LEARNED) == pytest.approx((2 / 3 + 8 / 7) / 2)


def test_retention_of_a_skill_never_learned_is_undefined():
    assert np.isnan(retention.retention([[0.0], [0.0], [0.4]], [1])[0])


def test_non_square_rows_without_a_skill_and_two_skills_in_one_row():
    # Row 1 teaches a and b together, row 2 teaches none, row 3 teaches c, row 4 teaches none.
    matrix = [[0.0, 0.1, 0.2], [0.8, 0.6, 0.2], [0.8, 0.5, 0.3], [0.7, 0.5, 0.9], [0.6, 0.6, 0.9]]
    learned = [1, 1, 3]
    np.testing.assert_allclose(retention.forgetting(matrix, learned), [0.2, 0.0, 0.0], atol=1e-12)
    # c was taught before the last row, so it counts: ((.6-.8) + (.6-.6) + (.9-.9)) / 3
    assert retention.backward_transfer(matrix, learned) == pytest.approx(-0.2 / 3)
    assert retention.forward_transfer(matrix, learned) == pytest.approx(0.1)  # c only: 0.3 - 0.2


def test_unmeasured_cells_give_nan_for_that_skill_and_are_left_out_of_means():
    matrix = np.array(MATRIX)
    matrix[1, 0] = NAN  # a was not measured when it was learned
    matrix[0, 1] = NAN  # b has no base number
    assert np.isnan(retention.forgetting(matrix, LEARNED)[0])
    assert np.isnan(retention.retention(matrix, LEARNED)[0])
    assert retention.max_forgetting(matrix, LEARNED)[0] == pytest.approx(0.2)  # best measured: 0.8 - 0.6
    assert retention.backward_transfer(matrix, LEARNED) == pytest.approx(0.1)  # b alone
    assert retention.forward_transfer(matrix, LEARNED) == pytest.approx(0.2)  # c alone
    matrix[3, 0] = NAN
    assert np.isnan(retention.max_forgetting(matrix, LEARNED)[0])
    assert retention.average_accuracy(matrix) == pytest.approx(0.65)  # (0.8 + 0.5) / 2


def test_nothing_measured_or_nothing_earlier_is_nan_without_a_warning():
    assert np.isnan(retention.average_accuracy([[NAN], [NAN]]))
    assert np.isnan(retention.backward_transfer([[0.1], [0.9]], [1]))
    assert np.isnan(retention.forward_transfer([[0.1], [0.9]], [1]))
    assert np.isnan(retention.mean_retention([[0.1], [0.9]], [1]))


def test_base_alone_has_an_average():
    assert retention.average_accuracy([[0.25, 0.75]]) == 0.5


def test_inputs_are_not_mutated():
    matrix = np.array(MATRIX)
    before = matrix.copy()
    retention.final_accuracy(matrix)[:] = 0
    retention.accuracy_when_learned(matrix, LEARNED)[:] = 0
    for function in (retention.forgetting, retention.max_forgetting, retention.retention, retention.mean_retention):
        function(matrix, LEARNED)
    np.testing.assert_array_equal(matrix, before)
    assert LEARNED == [1, 2, 3]


@pytest.mark.parametrize(
    ("matrix", "learned", "message"),
    [
        ([0.1, 0.2], [1, 1], r"expected \[stages \+ 1, skills\]"),
        ([[]], [], r"expected \[stages \+ 1, skills\]"),
        ([[0.1, 0.2], [0.3, 0.4]], [1], "one row per skill"),
        ([[0.1], [0.2]], [0], "row 0 is the base model"),
        ([[0.1], [0.2]], [2], r"expected a row 1\.\.1"),
        ([[0.1], [0.2]], [0.5], r"expected a row 1\.\.1"),
        ([[0.1], [20.0]], [1], "between 0 and 1"),
        ([[0.1], [-0.1]], [1], "between 0 and 1"),
    ],
)
def test_wrong_shapes_are_refused_in_words(matrix, learned, message):
    with pytest.raises(ValueError, match=message):
        retention.forgetting(matrix, learned)
