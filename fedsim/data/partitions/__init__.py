"""Who holds which rows: partitions by name."""

from fedsim.data.partitions.base import PartitionParams
from fedsim.data.partitions.dirichlet import Dirichlet, LabelQuantity
from fedsim.data.partitions.iid import IID
from fedsim.data.partitions.natural import Given, Natural
from fedsim.data.partitions.pathological import Pathological
from fedsim.data.partitions.quantity import QuantitySkew
from fedsim.data.partitions.shards import Shards

PARTITIONS: dict[str, type[PartitionParams]] = {
    "iid": IID,
    "dirichlet": Dirichlet,
    "shards": Shards,
    "pathological": Pathological,
    "natural": Natural,
    "quantity_skew": QuantitySkew,
    "label_quantity": LabelQuantity,
    "given": Given,
}

__all__ = [
    "IID",
    "PARTITIONS",
    "Dirichlet",
    "Given",
    "LabelQuantity",
    "Natural",
    "PartitionParams",
    "Pathological",
    "QuantitySkew",
    "Shards",
]
