"""The command line. Joins the core, the probes and the reports, and imports each only when it is called.

Exit codes: 0 good; 1 the gate failed; 2 cannot judge or bad input; 130 interrupted.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from geomssl import __version__
from geomssl.errors import GeomsslError, GeomsslNote, nearest
from geomssl.registry import names

COMMANDS = {
    "demo": ("geomssl.demo:command", "train, measure, report and gate on embedded data"),
    "train": ("geomssl.commands.training:train", "train an encoder by a recipe"),
    "sweep": ("geomssl.commands.sweeping:sweep", "train and measure cells x seeds of a file, and write one table"),
    "probe": ("geomssl.commands.probing:probe", "run every probe, features computed once"),
    "features": ("geomssl.commands.exporting:features", "features, labels and factors of a split as plain arrays"),
    "report": ("geomssl.commands.judging:report", "one HTML file from the artifacts of one run or more"),
    "gate": ("geomssl.commands.judging:gate", "judge a run by rules; exit 1 where it fails"),
    "toy": ("geomssl.commands.toy:toy", "small worlds that show a claim of a paper, without data"),
    "datasets": ("geomssl.commands.listing:datasets", "list the data sets"),
    "recipes": ("geomssl.commands.listing:recipes", "list the installed recipes"),
    "doctor": ("geomssl.commands.doctor:doctor", "what this machine has, and what is wrong with it"),
}

# What a full disk, a quota or a file-size limit says.
NO_ROOM = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS}


class Commands(click.Group):
    """Names and help lines come from tables, so that --help imports nothing heavy."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*COMMANDS, *names("probe")]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in COMMANDS:
            module, _, attribute = COMMANDS[name][0].partition(":")
            return getattr(importlib.import_module(module), attribute)
        if name in names("probe"):
            from geomssl.commands.probing import probe_command

            return probe_command(name)
        return None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[Any, Any, list[str]]:
        if args and args[0] not in self.list_commands(ctx):
            valid = self.list_commands(ctx)
            raise GeomsslError(
                f"unknown command {args[0]!r}", f"one of {', '.join(valid)}", nearest(args[0], valid), reason="unknown-name"
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])
        with formatter.section("Probes"):
            formatter.write_dl(list(names("probe").items()))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="geomssl")
def geomssl() -> None:
    """Train self-supervised image models, and measure what the training did to their geometry.

    \b
    geomssl demo                              see it all, on embedded data, in minutes
    geomssl train digits-simclr --out run.pt  train by an installed recipe
    geomssl equivariance --checkpoint run.pt --transform c4
    geomssl probe all --checkpoint run.pt     every probe
    geomssl report run.pt other.pt -o report.html
    geomssl gate --checkpoint run.pt --rules gate.toml

    Exit codes: 0 good; 1 the gate failed; 2 cannot judge or bad input; 130 interrupted.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. A mistake is one line on stderr; a fault is one line and a log."""
    try:
        with _notes():
            code = geomssl.main(list(arguments) if arguments is not None else None, "geomssl", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except GeomsslError as error:
        return _complain(str(error), error.reason)
    except click.exceptions.NoSuchOption as error:
        guess = f"; did you mean {error.possibilities[0]!r}?" if error.possibilities else ""
        return _complain(f"unknown option {error.option_name}; expected one that --help lists{guess}", "unknown-option")
    except click.ClickException as error:
        return _complain(error.format_message().replace("\n", " "), "bad-usage")
    except (KeyboardInterrupt, click.exceptions.Abort):
        click.echo("geomssl: interrupted; the last whole checkpoint is kept", err=True)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            # wherever it was met: libraries write caches of their own
            place = error.filename or "a temporary file or cache"
            return _complain(f"cannot write {place}: {error.strerror}; expected room and permission to write", "unwritable")
        said = (str(error).splitlines() or [""])[0]
        return _complain(f"fault: {type(error).__name__}: {said}; {_logged()}", "fault")


@contextmanager
def _notes() -> Iterator[None]:
    """What the library warns of is one line, said once; other warnings stay Python's."""
    said: set[str] = set()
    with warnings.catch_warnings():
        others = warnings.showwarning
        warnings.simplefilter("always", GeomsslNote)

        def show(message: Warning | str, category: type[Warning], *place: Any) -> None:
            if not issubclass(category, GeomsslNote):
                others(message, category, *place)
            elif str(message) not in said:
                said.add(str(message))
                click.echo(f"geomssl: note: {message}", err=True)

        warnings.showwarning = show  # type: ignore[assignment]
        yield


def _logged() -> str:
    """Put the traceback of the present fault in a file, and say where."""
    try:
        handle, log = tempfile.mkstemp(prefix="geomssl-", suffix=".log")
        with os.fdopen(handle, "w") as file:
            file.write(f"command: {json.dumps(sys.argv)}\n{traceback.format_exc()}")
    except OSError as error:
        return f"no traceback could be written ({error.strerror})"
    return f"the traceback is in {Path(log)}"


def _complain(line: str, reason: str) -> int:
    click.echo(f"geomssl: {line} [{reason}]", err=True)
    return 2


def entry() -> None:
    """The console script."""
    sys.exit(main())


if __name__ == "__main__":
    entry()
