"""Speed of upsample at the network's own shapes, forward and in training; see conftest.py."""

SUITE = "upsample"


def test_forward(measure, part, contender):
    measure(part, contender)


def test_backward(measure, part, contender):
    measure(part, contender, backward=True)
