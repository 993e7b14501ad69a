"""fedsim beside hand-written torch loops: the same work, in one process, taking turns.

make bench                      all workloads
make bench ARGS="W1 --repetitions 30 --out bench.md"
"""
