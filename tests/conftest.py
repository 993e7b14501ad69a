"""What holds for all tests."""

from __future__ import annotations

from hypothesis import settings

# An example that takes long on a busy machine is no mistake.
settings.register_profile("fedsim", deadline=None)
settings.load_profile("fedsim")
