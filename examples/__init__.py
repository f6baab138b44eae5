"""Recipes (TOML), installed as geomssl.recipes."""
