"""The commands that aren't LightningCLI's: recipes, plan, verify, export, reshard, plot."""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from typing_extensions import override

from thanos_lightning.cli.mistakes import DEBUG, PROGRAM, Mistake, did_you_mean
from thanos_lightning.cli.parsing import find, headline, launch_files, recipes

if TYPE_CHECKING:
    from thanos_lightning.checkpoints.verify import TensorReport


TRAINER_COMMANDS = {
    "fit": "train, and prune on the callback's schedule",
    "validate": "run the validation loop",
    "test": "run the test loop",
}
GIGABYTES = {"a100": 80, "h100": 80, "h200": 141, "b200": 180, "l40s": 48, "mi300x": 192, "mi325x": 256}  # data sheets


class _Parser(argparse.ArgumentParser):
    """A parser that reports its errors in one line."""

    @override
    def error(self, message: str) -> NoReturn:
        meant = ""
        if unknown := re.search(r"invalid choice: '(.+?)' \(choose from (.+)\)", message):
            meant = did_you_mean(unknown[1], re.findall(r"[\w-]+", unknown[2]))
        self.exit(2, f"{PROGRAM}: error: {message}{meant and f': {meant[:-1]}'} (`{self.prog} --help` tells more)\n")


def command_parser() -> argparse.ArgumentParser:
    """Build a parser whose result holds the command's function in `run`, beside the arguments of that function."""
    parser = _Parser(
        prog=PROGRAM,
        description="Prune language models while they are fine-tuned, and prove the zeros on disk.",
        epilog=f"{PROGRAM} COMMAND --help tells more. {DEBUG}=1 shows the traceback of an error.",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {importlib.metadata.version(PROGRAM)}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, text in TRAINER_COMMANDS.items():  # only for the help: main() sends them to LightningCLI
        commands.add_parser(name, help=text, add_help=False)
    _add_commands_before_a_training(commands)
    _add_commands_for_checkpoints(commands)
    text = "draw a run: metric and loss over steps, sparsity and loss of each layer (needs matplotlib)"
    plot = _add(commands, "plot", _plot, text)
    plot.add_argument("report", help="the pruning_report.json of a training")
    plot.add_argument("output", metavar="PICTURE", help="file to write, such as report.png")
    return parser


def _add(commands: Any, name: str, run: Callable[..., int], text: str, **settings: Any) -> argparse.ArgumentParser:
    # SUPPRESS leaves out arguments that are not given, so that the function's own defaults apply.
    settings = {"description": text, "argument_default": argparse.SUPPRESS, **settings}
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, **settings)
    command.set_defaults(run=run)
    return command


def _add_commands_before_a_training(commands: Any) -> None:
    text = "list the recipes and launch files that come with the package, or print one"
    recipes = _add(commands, "recipes", _recipes, text)
    recipes.add_argument("name", metavar="NAME", nargs="?", help=f"{PROGRAM} recipes quickstart > my.yaml copies one")

    text = "say what fit would take, before a cluster is rented: memory, windows, messages; exit 1 if it does not fit"
    plan = _add(
        commands,
        "plan",
        _plan,
        text,
        description=f"{text[0].upper()}{text[1:]}. No weights and no GPU are needed.",
        epilog=f"All other arguments are those of `{PROGRAM} fit`, such as --config and --trainer.max_steps.",
        usage=f"{PROGRAM} plan --config RECIPE [options] [arguments of fit]",
        allow_abbrev=False,
    )
    plan.add_argument("--devices", type=int, metavar="N", help="devices of each machine, in place of the Trainer's")
    plan.add_argument("--num-nodes", type=int, metavar="N", help="machines, in place of the Trainer's")
    plan.add_argument("--device", type=str.lower, choices=GIGABYTES, help="its memory, by the data sheet")
    plan.add_argument("--memory-gib", type=float, metavar="GIB", help="memory of each device, if it is another")


def _add_commands_for_checkpoints(commands: Any) -> None:
    text = "count the zeros of a checkpoint; exit 1 and a table where a tensor does not conform"
    verify = _add(commands, "verify", _verify, text)
    verify.add_argument("checkpoint", help="folder of Hugging Face, .safetensors or .gguf file, or trainer checkpoint")
    verify.add_argument("--pattern", help='"2:4" (any N:M), "unstructured", "structured"; else what was recorded')
    verify.add_argument("--sparsity", type=float, help="fraction of zeros, where the pattern does not imply it")
    verify.add_argument("--outlier-fraction", type=float, metavar="FRACTION", help="fraction of rows that are dense")
    verify.add_argument("--targets", nargs="+", metavar="NAME", help="layers that the pattern is for: globs or re:…")
    verify.add_argument("--ignore", nargs="*", metavar="NAME", help="layers that it is not for (lm_head)")

    export = _add(commands, "export", _export, "write a trainer checkpoint as a Hugging Face folder, verified")
    export.add_argument("checkpoint", help="trainer checkpoint (.ckpt)")
    export.add_argument("output", metavar="OUT", help="folder to write; must not exist, or be empty")
    export.add_argument("--dtype", help="of the written weights, such as bfloat16; as in the checkpoint by default")
    export.add_argument("--keep-shape", action="store_true", help="leave channels that were pruned in, as zeros")
    export.add_argument("--keep-adapter", action="store_true", help="write LoRA adapters beside the sparse weights")
    export.add_argument("--tokenizer", metavar="NAME", help="name or path; the one used in training by default")

    text = "convert a DeepSpeed checkpoint folder so that any number of ranks resumes it"
    reshard = _add(commands, "reshard", _reshard, text)
    reshard.add_argument("checkpoint", help="folder that DeepSpeed's strategy wrote, at ZeRO stage 1, 2 or 3")
    reshard.add_argument("output", metavar="OUT", nargs="?", help="folder to write; CHECKPOINT-resharded by default")
    reshard.add_argument("--processes", type=int, metavar="N", help="how many convert at a time (1)")
    reshard.add_argument(
        "--trusted", action="store_true", help="read other objects than plain values, which may run code"
    )


def _recipes(name: str | None = None) -> int:
    of_recipes, of_launches = recipes(), launch_files()
    if name is not None:
        sys.stdout.write(find(name, of_recipes | of_launches).read_text(encoding="utf-8"))
        return 0
    lines: list[str] = []
    for head, files in (
        (f"{PROGRAM} fit --config NAME", of_recipes),
        (f"to start it on several machines: {PROGRAM} recipes NAME > NAME", of_launches),
    ):
        lines.append(head)
        column = max(map(len, files))
        columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
        for name, file in files.items():
            lines.append(
                textwrap.fill(
                    f"  {name:{column}}  {headline(file)}",
                    width=max(columns, column + 30),
                    subsequent_indent=" " * (column + 4),
                    break_on_hyphens=False,
                )
            )
    sys.stdout.write("\n".join([*lines, ""]))
    return 0


def _plan(arguments: list[str], **options: Any) -> int:
    from thanos_lightning.cli.planning import plan  # imports Lightning

    return plan(arguments, **options)


def _plot(report: str, output: str) -> int:
    from thanos_lightning.report.data import PruningReport
    from thanos_lightning.report.plots import plot_report

    try:
        plot_report(PruningReport.read(Path(report)), Path(output))
    except ValueError as error:  # matplotlib raises it
        if "is not supported" not in str(error):
            raise
        raise Mistake(f"{output} has an ending that is no format of pictures: give .png, .svg or .pdf") from error
    sys.stdout.write(f"{output}: a picture of {report}\n")
    return 0


def _reshard(checkpoint: str, output: str | None = None, **options: Any) -> int:
    from thanos_lightning.checkpoints.reshard import reshard_checkpoint

    folder = reshard_checkpoint(checkpoint, output, **options)
    sys.stdout.write(f"{folder}: resume from it on any number of ranks (ckpt_path)\n")
    return 0


def _verify(checkpoint: str, pattern: str | None = None, **options: Any) -> int:
    from thanos_lightning.checkpoints.verify import verify_checkpoint
    from thanos_lightning.solver import parse_pattern

    if pattern is None and options:
        raise ValueError("--sparsity, --outlier-fraction, --targets and --ignore go with a pattern: give --pattern")
    wanted = None
    if pattern is not None:
        wanted = parse_pattern(pattern, options.pop("sparsity", None), options.pop("outlier_fraction", None))
    with warnings.catch_warnings(record=True) as caught:
        reports = verify_checkpoint(checkpoint, wanted, **options)
    _write_warnings(caught)
    status = _conclude(checkpoint, reports)
    if status and wanted is not None and wanted.rows_compete:
        sys.stderr.write(
            f"{PROGRAM}: an allocation gives each layer a share of its own: where they were recorded, they are checked "
            "without --pattern\n"
        )
    return status


def _export(checkpoint: str, output: str, **options: Any) -> int:
    from thanos_lightning.checkpoints.export import NonconformingError, export_checkpoint

    try:
        with warnings.catch_warnings(record=True) as caught:
            reports = export_checkpoint(checkpoint, output, **options)
    except NonconformingError as error:
        return _conclude(f"{checkpoint} (nothing was exported)", error.reports)
    _write_warnings(caught)
    status = _conclude(output, reports)
    if any(report.zeros for report in reports):
        sys.stdout.write(
            "If you quantise it: int8 and int4, rounded to nearest, keep the zeros; GPTQ and GGUF's Q4_K do not\n"
        )
    return status


def _write_warnings(caught: Sequence[warnings.WarningMessage]) -> None:
    for warning in caught:
        sys.stderr.write(f"{PROGRAM}: warning: {warning.message}\n")


def _conclude(what: str, reports: Sequence[TensorReport]) -> int:
    """Write the summary, and a table of the tensors that do not conform. Returns the exit status."""
    from rich.console import Console
    from rich.table import Table

    from thanos_lightning.checkpoints.verify import smaller_shapes

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200  # a log file has no right edge, so names stay whole
    failed = [report for report in reports if not report.ok]
    if failed:
        table = Table("tensor", "shape", "pattern", "asked", "zeros", "violations", "what is wrong")
        for report in failed:
            table.add_row(
                report.name,
                "×".join(map(str, report.shape)),
                report.pattern,
                f"{report.sparsity:.2%}",
                f"{report.zeros / report.numel:.2%}" if report.numel else "",
                str(report.violations),
                "; ".join(report.problems),
            )
        console.print(table)
        summary = f"{len(failed)} of {len(reports)} tensors do not conform"
    else:
        patterns = ", ".join(sorted({report.pattern for report in reports}))
        share = sum(report.zeros for report in reports) / sum(report.numel for report in reports)
        summary = f"{len(reports)} tensors conform ({patterns}), {share:.2%} of their entries are 0"
        if shapes := smaller_shapes(reports):
            summary += f"; {shapes}"
    console.print(f"{what}: {summary}", markup=False, soft_wrap=True)
    return 1 if failed else 0
