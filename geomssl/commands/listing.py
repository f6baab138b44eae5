"""geomssl datasets and geomssl recipes: what is there."""

from __future__ import annotations

import click

from geomssl.registry import names


@click.command()
@click.option("--root", metavar="DIR", help="look in this folder  [default: $GEOMSSL_DATA, then the cache]")
def datasets(root: str | None) -> None:
    """List the data sets: what each is, whether it is here, and where or how to get it.

    Files are looked at by name and size; their hashes are checked when they are read. Nothing is fetched.

    \b
    Examples:
      geomssl datasets
      geomssl datasets --root ~/data
    """
    from geomssl import data

    lines = []
    for name, line in names("dataset").items():
        try:
            found = data.presence(name, root)
        except ImportError as error:
            found = data.Presence(False, "", f"cannot be imported: {error}")
        images = f"{found.images} images; " if found.images else ""
        lines.append(f"{name:<14} {'here' if found.present else '-':<5} {line}\n{'':<21}{images}{found.where}")
    click.echo("\n".join(lines))


@click.command()
def recipes() -> None:
    """List the installed recipes.

    \b
    Example:
      geomssl recipes
    """
    from geomssl.recipe import installed

    found = installed()
    width = max(map(len, found)) + 2
    for name, path in found.items():
        click.echo(f"{name:<{width}}{path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}")
