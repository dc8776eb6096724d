"""Speed of a training step; see conftest.py."""

SUITE = "train"


def test_train(measure, part, contender):
    measure(part, contender)
