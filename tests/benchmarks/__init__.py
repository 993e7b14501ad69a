"""fedsim beside its peers and hand-written torch loops: the same work, taking turns in one run.

make bench                      all tables, into docs/benchmarks.md
make bench ARGS="W1 W3-1k --repetitions 30 --sides fedsim,pfl,pfl-2 --out bench.md"

`python -m tests.benchmarks` does without the peers' environment: it leaves them out and says so.
"""
