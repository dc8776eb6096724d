"""Speed of batch_norm at the network's own shapes, in training; see conftest.py."""

SUITE = "batch_norm"


def test_backward(measure, part, contender):
    measure(part, contender, backward=True)
