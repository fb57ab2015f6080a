"""How answers are scored: the share of right ones and its standard error."""

import pytest

from utils.evaluate.methods import share_right


def test_the_share_of_right_answers_and_its_error():
    figure = share_right("accuracy", "accuracy", [True, True, True, False])
    assert figure.value == 75
    # the standard deviation of 1, 1, 1, 0 is 0.5, over the root of 4
    assert figure.error == pytest.approx(25)
    assert share_right("accuracy", "accuracy", [True]).error is None
