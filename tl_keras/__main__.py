"""`python -m tl_keras`."""

from tl_keras.main import entry_point

entry_point()
