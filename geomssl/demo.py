"""`geomssl demo`: train three encoders on digits, measure them, write one report, and judge 90-degree turns.

It exits 0 when every verdict is the expected one: the C4 backbone passes, the plain ones fail.
"""

from __future__ import annotations

import time
from pathlib import Path

import click

# run -> (installed recipe, the verdict that its backbone must get)
RUNS = {
    "simclr-cnn": ("digits-simclr", "fail"),
    "hssl-c4-cnn": ("digits-hssl", "pass"),
    "ciper-cnn": ("digits-ciper", "fail"),
}
RULES = "gate-turns"


@click.command()
@click.option("--out", default="demo", show_default=True, metavar="DIR", help="folder for everything it writes")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="seed of every draw")
@click.option("--quiet", is_flag=True, help="no progress")
def command(out: str, seed: int, quiet: bool) -> int:
    """Train three encoders on scanned digits, measure them, write one report, judge 90-degree turns.

    SimCLR on a plain CNN, H-SSL on a C4 group CNN, CIPER on a plain CNN. Exits 0 when every verdict is the expected one:
    the C4 backbone passes and the plain ones fail.

    \b
    Example:
      geomssl demo --out demo
    """
    from importlib.resources import files as resources

    from geomssl import device, files, training
    from geomssl.commands.probing import measure, measure_all
    from geomssl.probes import load
    from geomssl.progress import shown, track
    from geomssl.recipe import build, read
    from geomssl.reports import gate
    from geomssl.reports.html import render
    from geomssl.reports.junit import junit
    from geomssl.reports.markdown import append_step_summary, summary

    started = time.monotonic()
    folder = Path(out)
    files.check(folder / "report.html")
    here = device.device("cpu")
    rules = gate.read_rules(str(resources("geomssl.recipes") / f"{RULES}.toml"))
    artifacts = []
    with shown(not quiet):
        for run, (recipe, _) in track(RUNS.items(), "demo, run by run", total=len(RUNS)):
            path = folder / f"{run}.pt"
            trainer = training.start(build([read(recipe), {"seed": seed}], recipe), path, here, overwrite=True)
            last = trainer.run()[-1]
            click.echo(
                f"\n{run}: {last['epoch']} epochs, loss {last['loss']:.3f}, "
                f"online validation accuracy {last['online_val_accuracy']:.3f}"
            )
            subject = load.from_checkpoint(path)
            subject.provenance["command"] = f"geomssl demo --out {out} --seed {seed}"
            for found, _ in measure_all(subject, path.with_suffix("")):
                click.echo(f"  {found.probe:<13} {found.headline}")
                artifacts.append(found)
            artifacts += [measure(rule.probe, subject, rule.options, path.with_suffix(""))[0] for rule in rules.rule]
    # a rule may ask for what a probe has measured by its defaults
    artifacts = list({(a.run, a.probe, a.options_hash): a for a in artifacts}.values())
    verdicts = gate.evaluate(artifacts, rules)
    report = files.write(folder / "report.html", render(artifacts, verdicts, title="geomssl demo: three encoders on digits"))
    xml = files.write(folder / "gate.xml", junit(verdicts))
    append_step_summary(summary(verdicts, artifacts))
    click.echo("")
    for verdict in verdicts:
        click.echo(gate.describe(verdict))
    wanted = {run: expected for run, (_, expected) in RUNS.items()}
    surprises = [v for v in verdicts if v.verdict != wanted[v.run]]
    click.echo(f"\nwrote, in {time.monotonic() - started:.0f} s:")
    for path in (report, xml, *(folder / f"{run}.pt" for run in RUNS), *(folder / run for run in RUNS)):
        click.echo(f"  {path}{'/' if path.is_dir() else ''}")
    if surprises or len(verdicts) != len(RUNS):
        for verdict in surprises:
            click.echo(f"geomssl: {verdict.run}: {verdict.verdict}; expected {wanted[verdict.run]} [surprise]", err=True)
        return 1
    click.echo("every verdict is the expected one: the C4 backbone passes 90-degree turns, the plain ones do not")
    return 0
