"""The command line: one module per group of verbs, which import what is heavy inside the verb; nothing else prints."""

from __future__ import annotations

import click

from raysweep.cli import audits, models, runs, setup
from raysweep.cli.common import quiet_libraries


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="raysweep")
@click.pass_context
def main(context: click.Context) -> None:
    """Pareto sweeps and audits of unlearning methods for diffusion models, on Ray."""
    context.with_resource(quiet_libraries())


for verb in (
    *(runs.run, runs.validate, runs.status, runs.report, runs.show),
    *(audits.audit, audits.sign, audits.verify, audits.shadows),
    *(models.export, models.remake, models.patch, models.convert, models.draw),
    *(setup.init, setup.list_, setup.doctor),
):
    main.add_command(verb)
