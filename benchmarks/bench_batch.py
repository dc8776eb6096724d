"""Speed of a folder of files, read, denoised and written; fastden's start counts here; see conftest.py."""

SUITE = "batch"


def test_batch(measure, part, contender):
    measure(part, contender)
