"""Tests that every strategy and engine must pass, fedsim's own and yours.

    # test_mine.py
    from fedsim.testing import StrategyContract
    from my_package.mine import Mine, MineParams

    class TestMine(StrategyContract):
        def make(self):
            return Mine(MineParams())

pytest runs what the class inherits. It is not imported here: fedsim itself does not need it.
"""

from fedsim.testing.contract import StrategyContract
from fedsim.testing.engines import ENGINES, Engine, inline
from fedsim.testing.federation import distance, federation, same_bits
from fedsim.testing.memory import Memory

__all__ = [
    "ENGINES",
    "Engine",
    "Memory",
    "StrategyContract",
    "distance",
    "federation",
    "inline",
    "same_bits",
]
