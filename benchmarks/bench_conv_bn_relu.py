"""Speed of conv_bn_relu at the network's own shapes, forward and in training; see conftest.py."""

SUITE = "conv_bn_relu"


def test_forward(measure, part, contender):
    measure(part, contender)


def test_backward(measure, part, contender):
    measure(part, contender, backward=True)
