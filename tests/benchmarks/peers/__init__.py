"""The peers, each in a program of its own that the benchmark starts in their environment.

Nothing here may import fedsim's engine: of fedsim the workloads need the random numbers alone.
"""
