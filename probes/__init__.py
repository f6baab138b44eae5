"""Measurements. A file each, named as the command, the artifact and the docs page. Nothing is re-exported here."""
