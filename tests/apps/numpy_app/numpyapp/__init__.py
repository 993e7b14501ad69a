"""A Flower app in NumPy."""
