"""What holds for all tests."""

from __future__ import annotations

import signal

from hypothesis import settings

# An example that takes long on a busy machine is no mistake.
settings.register_profile("fedsim", deadline=None)
settings.load_profile("fedsim")

# what a shell runs in the background ignores interrupts, and so would all that the tests start
signal.signal(signal.SIGINT, signal.default_int_handler)
