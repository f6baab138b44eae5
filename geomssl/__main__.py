"""`python -m geomssl`."""

from geomssl.cli import entry

entry()
