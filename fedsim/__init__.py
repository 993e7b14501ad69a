"""fedsim: federated learning on Flower's API."""

__version__ = "0.1.0"
