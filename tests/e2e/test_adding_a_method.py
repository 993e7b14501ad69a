"""The strategy in docs/adding-a-method.md does what the page says."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from fedsim.messages import Replies, to_tensors

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-method.md"


@pytest.fixture
def median(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module printed on the page."""
    (source,) = re.findall(r"```python\n# my_median.py\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "median_of_the_page.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "median_of_the_page", raising=False)
    return importlib.import_module("median_of_the_page")


@pytest.mark.parametrize("clients", [1, 4, 5])
def test_median_strategy_agrees_with_numpy(median: ModuleType, clients: int) -> None:
    values = np.random.default_rng(clients).standard_normal((clients, 3, 2))
    replies = Replies(
        tuple(range(clients)),
        {"arrays": {"w": torch.from_numpy(values)}},
        {"num-examples": torch.ones(clients, dtype=torch.float64)},
    )
    strategy = median.Median(median.MedianParams())
    arrays, _ = strategy.aggregate_train(1, replies)
    np.testing.assert_allclose(to_tensors(arrays)["w"].numpy(), np.median(values, axis=0))


def test_median_strategy_keeps_the_parameters_if_nobody_answered(median: ModuleType) -> None:
    replies = Replies((), {"arrays": {}}, {})
    assert median.Median(median.MedianParams()).aggregate_train(1, replies) == (None, None)
