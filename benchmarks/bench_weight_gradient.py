"""Speed of weight_gradient at the network's own shapes, in training; see conftest.py."""

SUITE = "weight_gradient"


def test_backward(measure, part, contender):
    measure(part, contender, backward=True)
