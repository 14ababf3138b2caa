"""Verbs that judge models: audit, sign, verify, shadows."""

from __future__ import annotations

import json
from pathlib import Path

import click

from raysweep.cli import completion
from raysweep.cli.common import (
    FAILED,
    INCOMPLETE,
    OK,
    load_sweep,
    open_run,
    print_json,
    print_rows,
    reports_errors,
    run_display,
)


@click.command()
@click.argument("model_dir")
@click.argument("config", required=False, shell_complete=completion.configs)
@click.argument("overrides", nargs=-1, shell_complete=completion.settings)
@click.option("--base", type=click.Path(), help="The model before unlearning; default: the config's.")
@click.option("--oracle", "oracles", type=click.Path(), multiple=True, help="A retrained model; default: trained here.")
@click.option("--json", "as_json", is_flag=True, help="Print the card as JSON.")
@reports_errors
def audit(
    model_dir: str,
    config: str | None,
    overrides: tuple[str, ...],
    base: str | None,
    oracles: tuple[str, ...],
    as_json: bool,
) -> int:
    """Audit a diffusers folder on the task of a config, next to base and oracles, and write its audit card.

    Oracles are models retrained without what must be forgotten.

    \b
    raysweep audit runs/digits-picture/candidates/012-rgd
    raysweep audit MODEL --base BASE --oracle RETRAINED-1 --oracle RETRAINED-2 config.yaml name=mine
    """
    from raysweep.engine.audit_model import audit_model

    if base is not None:
        overrides = (*overrides, f"task.base={json.dumps(base)}")
    if oracles:
        overrides = (*overrides, f"oracle_models={json.dumps(list(oracles))}")
    with run_display("none" if as_json else None) as display:
        path, card = audit_model(Path(model_dir), load_sweep(config, overrides), display)
    if as_json:
        print_json(card.plain())
    else:
        print_rows([vars(finding) | {"paired_with": ""} for finding in card.findings])
        for line in card.answer:
            click.echo(line)
        for entry in card.models[card.subject].not_read:
            click.echo(f"not read: {entry}")
        click.echo(f"card {path.parent}")
    return INCOMPLETE if card.incomplete else OK


@click.command()
@click.argument("card")
@click.option("--key", type=click.Path(), required=True, help="Private key of an elliptic curve, in PEM format.")
@reports_errors
def sign(card: str, key: str) -> int:
    """Sign an audit card with all files beside it, in the format of sigstore's model signing; needs no network.

    openssl ecparam -name prime256v1 -genkey -noout -out KEY; openssl ec -in KEY -pubout -out PUBLIC_KEY
    """
    from raysweep.results.signing import sign as write_signature

    click.echo(f"written {write_signature(Path(card), Path(key))}")
    return OK


@click.command()
@click.argument("card")
@click.option("--task", type=click.Path(), help="Folder of the task's data, if it is not where the card says.")
@click.option("--signature-key", type=click.Path(), help="Public key; checks the card's signature, too.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@reports_errors
def verify(card: str, task: str | None, signature_key: str | None, as_json: bool) -> int:
    """Check an audit card: its hashes and its models, and all that it says, computed again from the scores per sample.

    Exit codes: 0 everything agrees, 1 something differs, 3 something could not be checked, such as missing files.
    """
    from raysweep.results.verify import signature
    from raysweep.results.verify import verify as check

    lines = check(Path(card), None if task is None else Path(task))
    if signature_key is not None:
        lines.insert(0, signature(Path(card), Path(signature_key)))
    if as_json:
        print_json([vars(line) for line in lines])
    else:
        words = {True: "ok", False: "DIFFERS", None: "unknown"}
        for line in lines:
            click.echo(f"{words[line.holds]:<8} {line.what:<32} {line.detail}")
    if any(line.holds is False for line in lines):
        return FAILED
    return INCOMPLETE if any(line.holds is None for line in lines) else OK


@click.command()
@click.argument("run", shell_complete=completion.runs)
@click.argument("trial", shell_complete=completion.trials)
@click.option("--models", default=16, show_default=True, help="Shadows: pairs of an unlearned and a retrained model.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@reports_errors
def shadows(run: str, trial: str, models: int, as_json: bool) -> int:
    """Attack a trial's method with shadow models (U-LiRA): how well unlearned and retrained models can be told apart.

    Each shadow is a base, its unlearned version and a retrained model, so this costs as much as preparing that many sweeps
    and is meant for small models. Shadows that are already trained are reused.
    """
    from raysweep.engine.shadows import run_shadows

    with run_display("none" if as_json else None) as display:
        path, content = run_shadows(open_run(run), trial, models, display)
    if as_json:
        print_json(content)
        return OK
    summary, candidate = content["summary"], content["summary"]["candidate"]
    for name, label in (("accuracy", "accuracy over images"), ("auc_over_models", "AUC over models")):
        estimate = summary[name]
        click.echo(f"{label:<24} {estimate['value']:.3f} (95 % interval {estimate['lo']:.3f} to {estimate['hi']:.3f})")
    click.echo(
        f"{trial}: {candidate['images_told']} of {summary['images']} forgotten images look unlearned rather than never seen"
    )
    click.echo(f"written {path}")
    return OK
