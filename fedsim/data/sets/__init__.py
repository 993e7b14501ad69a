"""Data sets by name."""

from fedsim.data.base import DataParams
from fedsim.data.sets.bandit_objectives import BanditObjectives
from fedsim.data.sets.csv_file import CSV
from fedsim.data.sets.custom import Custom
from fedsim.data.sets.fashion import FashionMNIST
from fedsim.data.sets.gaussian import GaussianClients
from fedsim.data.sets.mnist import MNIST5k
from fedsim.data.sets.npz import NPZ
from fedsim.data.sets.parquet import Parquet
from fedsim.data.sets.regression import BayesianLinear, BayesianLogistic
from fedsim.data.sets.sklearn_sets import BreastCancer, Digits
from fedsim.data.sets.sliced import Sliced
from fedsim.data.sets.synthetic_clients import SyntheticClients

DATASETS: dict[str, type[DataParams]] = {
    "digits": Digits,
    "breast_cancer": BreastCancer,
    "mnist5k": MNIST5k,
    "fashion_mnist": FashionMNIST,
    "gaussian_clients": GaussianClients,
    "bandit_objectives": BanditObjectives,
    "bayesian_linear": BayesianLinear,
    "bayesian_logistic": BayesianLogistic,
    "synthetic_clients": SyntheticClients,
    "csv": CSV,
    "parquet": Parquet,
    "npz": NPZ,
    "sliced": Sliced,
    "custom": Custom,
}
