"""Bandits over boxes: cells, elimination rules, objectives, and ways to search them alone."""
