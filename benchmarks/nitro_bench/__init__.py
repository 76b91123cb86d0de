"""Benchmarks of nitro-rt: the output is checked against the reference first, then timed, then reported."""
