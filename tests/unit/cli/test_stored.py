"""What `fedsim show` says of a run's engine."""

from __future__ import annotations

from fedsim.cli.stored import engine_words


def test_the_time_of_tracing_is_shown() -> None:
    plan = {"path": "mapped", "threads": 2, "dtype": "float32"}
    traced = plan | {"graphs": 3, "trace_seconds": 0.418}
    assert engine_words(traced) == "mapped, 2 threads, 3 graphs traced in 0.4 s, float32"
    assert engine_words(plan | {"graphs": 0, "trace_seconds": 0.0}) == engine_words(plan)
    assert engine_words({}) == ""
