"""What a user sees of runs: terminal tables, figures, and one self-contained HTML page.

Nothing is imported here: `fedsim.report.tables` is light, `plots` and `html` load matplotlib.
"""
