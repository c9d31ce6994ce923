"""What all tests share."""

from hypothesis import settings

pytest_plugins = ["miles_core.testing.pytest_plugin"]

# A deadline for one example would measure how busy the machine is.
settings.register_profile("miles", deadline=None)
settings.load_profile("miles")
