"""What all tests share."""

from hypothesis import settings

# A deadline for one example would measure how busy the machine is.
settings.register_profile("miles", deadline=None)
settings.load_profile("miles")
