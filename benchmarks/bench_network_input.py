"""Speed of network_input, the step before the network; see conftest.py."""

SUITE = "network_input"


def test_forward(measure, part, contender):
    measure(part, contender)
