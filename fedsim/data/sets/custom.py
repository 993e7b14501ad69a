"""Data set `custom`: your own, by import path."""

from __future__ import annotations

import inspect
from typing import Any, Literal

from pydantic import Field

from fedsim.data.base import Source, TableParams
from fedsim.data.check import check_examples, check_federated, infer_info
from fedsim.data.examples import DataInfo, Examples, FederatedData
from fedsim.errors import FedsimError, UserError
from fedsim.registry import import_path

WANTED = "fedsim.data.Examples, (Examples, DataInfo) or FederatedData"


class Custom(TableParams):
    """A function of yours that returns the examples.

    It is called with `arguments` as keywords, and with `seed` (int) if it has a parameter of that
    name. It returns one of

    - `Examples(x, y)`: the rest is worked out from the arrays (integer y: classes 0..max);
    - `(Examples, DataInfo)`: where classes or names must be stated;
    - `FederatedData`: everything is in place; its shards, splits and scales are used as they are,
      `partition` must be `given` and the fractions, rows and scale are not applied. With `make`
      its clients' rows are made when they are asked for.
    """

    name: Literal["custom"] = "custom"
    factory: str = Field(description="Import path of the function, package.module:function.")
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments of the function."
    )
    scale: Literal["none", "unit", "standardise"] = Field(
        "none",
        description="none: features as returned. standardise: minus the mean, divided by the "
        "standard deviation of each feature over the training rows. unit: training minimum and "
        "maximum become 0 and 1.",
    )

    def call(self, seed: int) -> Any:
        """Returns what the factory returns; raises UserError if it fails."""
        function = import_path(self.factory)
        if not callable(function):
            raise UserError(f"data.factory: {self.factory} is not a function but {function!r}")
        arguments = dict(self.arguments)
        try:
            signature = inspect.signature(function)
            if "seed" in signature.parameters:
                arguments.setdefault("seed", seed)
            signature.bind(**arguments)
        except (TypeError, ValueError) as error:
            raise UserError(f"data.arguments: {self.factory}: {error}") from error
        try:
            return function(**arguments)
        except FedsimError:
            raise
        except Exception as error:  # the user's function may raise anything
            raise UserError(
                f"data.factory: {self.factory} raised {type(error).__name__}: {error}"
            ) from error

    def build(self, seed: int) -> Source | FederatedData:
        """Returns what the factory made, checked."""
        made = self.call(seed)
        if isinstance(made, FederatedData):
            return check_federated(made, self.factory)
        if isinstance(made, Examples):
            examples = check_examples(made, self.factory)
            return Source(infer_info(self.name, examples), examples)
        if (
            isinstance(made, tuple)
            and len(made) == 2
            and isinstance(made[0], Examples)
            and isinstance(made[1], DataInfo)
        ):
            return Source(made[1], check_examples(made[0], self.factory, made[1]))
        inside = f" of {', '.join(type(m).__name__ for m in made)}" if type(made) is tuple else ""
        raise UserError(
            f"data.factory: {self.factory} returned {type(made).__name__}{inside}; return {WANTED}"
        )

    def load(self, seed: int) -> Source:
        """See DataParams.load; a factory that returns FederatedData is not split."""
        made = self.build(seed)
        if isinstance(made, FederatedData):
            raise UserError(f"data.factory: {self.factory} returned FederatedData, not examples")
        return made
