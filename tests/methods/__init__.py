"""Each method through the real engine, against the independent programs in tests.oracles."""
