"""JSON gives back what was put in, or refuses."""

import json
import math
import struct

import numpy as np
import pytest

from fedsim.runs import exact


def test_floats_of_all_bit_patterns_come_back_to_the_bit():
    bits = np.random.default_rng(0).integers(0, 2**64, size=20_000, dtype=np.uint64)
    values = [float(value) for value in bits.view(np.float64) if not np.isnan(value)]
    values += [0.0, -0.0, 5e-324, 2.2250738585072014e-308, 1.7976931348623157e308, 0.1]
    found = exact.loads(exact.dumps(values))
    assert struct.pack(f"{len(values)}d", *found) == struct.pack(f"{len(values)}d", *values)


def test_what_json_lacks_comes_back_and_the_text_stays_strict_json():
    text = exact.dumps({"a": [math.inf, -math.inf, math.nan], "b": 2**200, "c": None, "d": True})
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    found = exact.loads(text)
    assert found["a"][:2] == [math.inf, -math.inf]
    assert math.isnan(found["a"][2])
    assert found["b"] == 2**200
    assert found["c"] is None
    assert found["d"] is True


def test_numpy_scalars_become_numbers():
    found = exact.loads(exact.dumps([np.float32(0.1), np.int64(2**62), np.bool_(False)]))
    assert found == [float(np.float32(0.1)), 2**62, False]
    assert [type(value) for value in found] == [float, int, bool]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"a": {1: 2}}, "state.a: 1 cannot be a key"),
        ({"a": [0, {1, 2}]}, r"state.a\[1\]: set cannot"),
        ({"a": np.zeros(2)}, "state.a: ndarray cannot"),
        ({"$float": 1}, "cannot be a key"),
    ],
)
def test_what_would_not_come_back_is_refused_with_its_place(value, words):
    with pytest.raises(TypeError, match=words):
        exact.dumps(value)
