"""Independent reference implementations (NumPy, SciPy, blackjax) that fedsim is tested against.

Nothing here imports fedsim's methods or engines: an oracle that shared code with what it checks
would share its mistakes.
"""
