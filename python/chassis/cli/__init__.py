"""The `chassis` command. Each group of commands has its file; torch is imported only once one of them runs."""

import typer

app = typer.Typer(
    name="chassis",
    help="Plug language models into each other: fit an adapter from text in one pass, measure it, speak with it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

from chassis.cli import fitting, using, lenses, tokenizing, bridging, distilling, checking  # noqa: E402, F401, I001  their commands register in this order


def main() -> None:
    """Entry point of the console script."""
    app()
