"""Data sets, and who holds which rows of them.

from fedsim.data import DATASETS, PARTITIONS, build_data

data = DATASETS["digits"]()
partition = PARTITIONS["dirichlet"](clients=10, alpha=0.1)
federated = build_data(data, partition, seed=0)
"""

from fedsim.data.base import DataParams, ImageParams, Source, SplitParams, TableParams
from fedsim.data.build import build_data
from fedsim.data.describe import describe
from fedsim.data.examples import DataInfo, Examples, FederatedData
from fedsim.data.partition import Partition
from fedsim.data.partitions import PARTITIONS, PartitionParams
from fedsim.data.sets import DATASETS

__all__ = [
    "DATASETS",
    "PARTITIONS",
    "DataInfo",
    "DataParams",
    "Examples",
    "FederatedData",
    "ImageParams",
    "Partition",
    "PartitionParams",
    "Source",
    "SplitParams",
    "TableParams",
    "build_data",
    "describe",
]
