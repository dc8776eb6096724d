"""Speed of the whole network at inference; see conftest.py."""

SUITE = "model"


def test_model(measure, part, contender):
    measure(part, contender)
