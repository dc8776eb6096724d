"""Measuring: the network, its operators, training and whole folders beside other ways to run the same thing.

``fastden bench`` (:mod:`fastden.bench.command`) is the command; ``benchmarks/`` holds suites for pytest-benchmark on
the same contenders. Nothing else in fastden imports this package.
"""
