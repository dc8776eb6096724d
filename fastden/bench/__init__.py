"""Measuring: the network, its operators, training and whole folders beside other ways to run the same thing.

The command is ``fastden bench`` (:mod:`fastden.cli.bench`); ``benchmarks/`` holds suites for pytest-benchmark on the
same contenders. Nothing else in fastden imports this package.
"""
