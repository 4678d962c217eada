"""For all tests."""

from hypothesis import settings

# A test's time says more about what else the machine does.
settings.register_profile("towers", deadline=None)
settings.load_profile("towers")
