"""geomssl datasets and geomssl recipes: what is there."""

from __future__ import annotations

import click

from geomssl.registry import names


@click.command()
def datasets() -> None:
    """List the data sets.

    \b
    Example:
      geomssl datasets
    """
    for name, line in names("dataset").items():
        click.echo(f"{name:<16} {line}")


@click.command()
def recipes() -> None:
    """List the installed recipes.

    \b
    Example:
      geomssl recipes
    """
    from importlib.resources import files as resources

    for path in sorted(resources("geomssl.recipes").iterdir(), key=lambda p: p.name):
        if path.name.endswith(".toml"):
            first = path.read_text().splitlines()[0].lstrip("# ")
            click.echo(f"{path.name.removesuffix('.toml'):<20} {first}")
