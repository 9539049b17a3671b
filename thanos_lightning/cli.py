"""thanos-lightning: train with a YAML file, verify the zeros of a checkpoint, export it, and what goes with these.

Training is LightningCLI and imports Lightning; verify and export don't, so that they start at once.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thanos_lightning.permutation import Reordered
    from thanos_lightning.verification import TensorReport

_PROGRAM = "thanos-lightning"
_DEBUG = "THANOS_LIGHTNING_DEBUG"
_TRAINER_COMMANDS = {
    "fit": "train, and prune on the callback's schedule",
    "validate": "run the validation loop",
    "test": "run the test loop",
    "predict": "run the prediction loop",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments after the program's name; those of the process by default.

    Returns:
        The exit status: 0, 1 where tensors do not conform, 2 for a user's mistake.

    Raises:
        SystemExit: For --help and --version, and where the arguments can't be parsed.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        # LightningCLI takes configuration files of several commands before the command
        if arguments and (arguments[0] in _TRAINER_COMMANDS or re.match(r"(-c|--config)(=|$)", arguments[0])):
            return _train(None if argv is None else arguments)
        parsed = vars(_parser().parse_args(arguments))
        command = parsed.pop("run")
        status: int = command(**parsed)
        return status
    except Exception as error:
        mistake = _users_mistake(error)
        if mistake is None or os.environ.get(_DEBUG):
            raise
        sys.stderr.write(f"{_PROGRAM}: error: {' '.join(str(mistake).split())}\n")
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description="Prune language models while they are fine-tuned, and prove the zeros on disk.",
        epilog=f"{_PROGRAM} COMMAND --help tells more. {_DEBUG}=1 shows the traceback of an error.",
    )
    parser.add_argument("--version", action="version", version=f"{_PROGRAM} {importlib.metadata.version(_PROGRAM)}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, text in _TRAINER_COMMANDS.items():  # for the help: main() sends them to LightningCLI
        commands.add_parser(name, help=text, add_help=False)

    text = "count the zeros of a checkpoint; exit 1 and a table where a tensor does not conform"
    # what isn't given stays away, so that the defaults are the ones of verify_checkpoint
    verify = commands.add_parser("verify", help=text, description=text, argument_default=argparse.SUPPRESS)
    verify.set_defaults(run=_verify)
    verify.add_argument("checkpoint", help="Hugging Face folder, .safetensors file, or trainer checkpoint (.ckpt)")
    verify.add_argument("--pattern", help='"2:4" (any N:M), "unstructured" or "structured"; else what was recorded')
    verify.add_argument("--sparsity", type=float, help="fraction of zeros, where the pattern does not imply it")
    verify.add_argument("--outlier-fraction", type=float, metavar="FRACTION", help="fraction of rows that are dense")
    verify.add_argument("--targets", nargs="+", metavar="NAME", help="layers that the pattern is for: globs or re:…")
    verify.add_argument("--ignore", nargs="*", metavar="NAME", help="layers that it is not for (lm_head)")

    text = "write a trainer checkpoint as a Hugging Face folder, verified"
    export = commands.add_parser("export", help=text, description=text, argument_default=argparse.SUPPRESS)
    export.set_defaults(run=_export)
    export.add_argument("checkpoint", help="trainer checkpoint (.ckpt)")
    export.add_argument("output", metavar="OUT", help="folder to write; must not exist, or be empty")
    export.add_argument("--dtype", help="of the written weights, such as bfloat16; as in the checkpoint by default")
    export.add_argument("--tokenizer", metavar="NAME", help="name or path; the one used in training by default")

    text = "convert a DeepSpeed checkpoint folder so that any number of ranks resumes it"
    reshard = commands.add_parser("reshard", help=text, description=text, argument_default=argparse.SUPPRESS)
    reshard.set_defaults(run=_reshard)
    reshard.add_argument("checkpoint", help="folder that DeepSpeed's strategy wrote, at ZeRO stage 1, 2 or 3")
    reshard.add_argument("output", metavar="OUT", nargs="?", help="folder to write; CHECKPOINT-resharded by default")
    reshard.add_argument("--processes", type=int, metavar="N", help="how many convert at a time (1)")

    text = "reorder a model's channels, which changes nothing that it computes, so that N:M loses less (needs scipy)"
    permute = commands.add_parser("permute", help=text, description=text, argument_default=argparse.SUPPRESS)
    permute.set_defaults(run=_permute)
    permute.add_argument("model", help="hub name or folder, as for training")
    permute.add_argument("output", metavar="OUT", help="folder to write; must not exist, or be empty")
    permute.add_argument("--text", required=True, nargs="+", help="to measure the channels on: TextData's dataset")
    permute.add_argument("--text-column", metavar="NAME", help="of a hub data set (text)")
    permute.add_argument("--dataset-config", metavar="NAME", help="of a hub data set")
    permute.add_argument("--blocks", type=int, metavar="N", help="blocks of text to measure them on (256)")
    permute.add_argument("--block-size", type=int, metavar="N", help="tokens of a block (128)")
    permute.add_argument("--pattern", help="the N:M that the model will be pruned to (2:4)")
    permute.add_argument("--targets", nargs="+", metavar="NAME", help="layers that will be pruned: globs or re:…")
    permute.add_argument("--ignore", nargs="*", metavar="NAME", help="layers that won't (lm_head)")
    permute.add_argument("--hessian-memory-gib", type=float, metavar="GIB", help="for the second moments of inputs")
    permute.add_argument("--dtype", help="of the written weights (float32)")
    permute.add_argument("--device", help="such as cuda (cpu)")

    text = "draw a pruning report: sparsity over steps, and each layer's loss (needs matplotlib)"
    plot = commands.add_parser("plot", help=text, description=text)
    plot.set_defaults(run=_plot)
    plot.add_argument("report", help="the pruning_report.json of a training")
    plot.add_argument("output", metavar="PICTURE", help="file to write, such as report.png")
    return parser


def _plot(report: str, output: str) -> int:
    from thanos_lightning.report import PruningReport, plot_report

    plot_report(PruningReport.read(Path(report)), Path(output))
    return 0


def _reshard(checkpoint: str, output: str | None = None, **options: Any) -> int:
    from thanos_lightning.resharding import reshard_checkpoint

    folder = reshard_checkpoint(checkpoint, output, **options)
    sys.stdout.write(f"{folder}: resume from it on any number of ranks (ckpt_path)\n")
    return 0


def _permute(
    model: str,
    output: str,
    text: list[str],
    pattern: str = "2:4",
    blocks: int = 256,
    dtype: str = "float32",
    device: str = "cpu",
    block_size: int = 128,
    text_column: str = "text",
    dataset_config: str | None = None,
    **options: Any,
) -> int:
    from thanos_lightning.folders import require_free, whole_folder
    from thanos_lightning.lm import TextData
    from thanos_lightning.lm.pretrained import load_pretrained, load_tokenizer
    from thanos_lightning.permutation import permute_channels, require_nm
    from thanos_lightning.solver.ordering import require_scipy

    wanted = require_nm(pattern)
    require_scipy()
    if blocks < 1:
        raise ValueError(f"--blocks is {blocks}: give at least 1, and better some hundred")
    free = Path(output).resolve()
    require_free(free)
    data = TextData(
        text[0] if len(text) == 1 else text,
        model,
        dataset_config=dataset_config,
        text_column=text_column,
        block_size=block_size,
        batch_size=1,
        calibration_batches=blocks,
    )
    loaded = load_pretrained(model, dtype)
    try:
        loaded = loaded.to(device)
    except (AssertionError, RuntimeError) as error:  # of torch, where it has no such device
        raise ValueError(f"device {device!r} can't be used ({str(error).splitlines()[0]}): leave it out") from error
    data.setup("fit")
    reordered = permute_channels(loaded, data.calibration_dataloader(), wanted, **options)
    with whole_folder(free) as folder:
        loaded.save_pretrained(folder)
        load_tokenizer(model).save_pretrained(folder)
    for kind, these in _by_kind(reordered).items():
        before, now = (sum(getattr(f, share) for f in these) / len(these) for share in ("kept_before", "kept"))
        sys.stdout.write(f"{kind}: the pattern keeps {now:.2%} of what the weights are worth, {before:.2%} before\n")
    sys.stdout.write(f"{output}: train and prune this one; it computes what {model} does\n")
    return 0


def _by_kind(reordered: Sequence[Reordered]) -> dict[str, list[Reordered]]:
    """The residual stream, the MLPs, the value heads."""
    kinds: dict[str, list[Reordered]] = {}
    for found in reordered:
        name = found.channels.name
        kind = "MLPs" if name.endswith("mlp") else "value heads" if " head " in name else name
        kinds.setdefault(kind, []).append(found)
    return kinds


def _verify(
    checkpoint: str,
    pattern: str | None = None,
    sparsity: float | None = None,
    outlier_fraction: float | None = None,
    **layers: Any,
) -> int:
    from thanos_lightning.solver import NM, Unstructured, parse_pattern
    from thanos_lightning.verification import verify_checkpoint

    if pattern is None and (layers or sparsity is not None or outlier_fraction is not None):
        raise ValueError("--sparsity, --outlier-fraction, --targets and --ignore go with a pattern: give --pattern")
    wanted = None if pattern is None else parse_pattern(pattern, sparsity, outlier_fraction)
    with warnings.catch_warnings(record=True) as caught:
        reports = verify_checkpoint(checkpoint, wanted, **layers)
    _write_warnings(caught)
    status = _conclude(checkpoint, reports)
    if isinstance(wanted, Unstructured):
        lacking = [max(0, int(report.sparsity * report.numel) - report.zeros) for report in reports]
        has_shares, missed = all(r.violations == lacks for r, lacks in zip(reports, lacking, strict=True)), 0
    else:
        has_shares = wanted is not None and not (isinstance(wanted, NM) and not wanted.outlier_fraction)
        missed = max((max(report.shape, default=0) for report in reports), default=0)  # a budget is met to the row
    budget = sum(int(report.sparsity * report.numel) for report in reports)
    if status and has_shares and sum(report.zeros for report in reports) >= budget - missed:
        sys.stderr.write(
            f"{_PROGRAM}: together the tensors have zeros enough. An allocation gives each layer a share of its own: "
            "where they were recorded, they are checked without --pattern\n"
        )
    return status


def _export(checkpoint: str, output: str, **options: Any) -> int:
    from thanos_lightning.export import NonconformingError, export_checkpoint

    try:
        with warnings.catch_warnings(record=True) as caught:
            reports = export_checkpoint(checkpoint, output, **options)
    except NonconformingError as error:
        return _conclude(f"{checkpoint} (nothing was exported)", error.reports)
    _write_warnings(caught)
    return _conclude(output, reports)


def _write_warnings(caught: Sequence[warnings.WarningMessage]) -> None:
    for warning in caught:
        sys.stderr.write(f"{_PROGRAM}: warning: {warning.message}\n")


def _conclude(what: str, reports: Sequence[TensorReport]) -> int:
    """Write the summary, and a table of the tensors that do not conform. Returns the exit status."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200  # a log file has no edge, and names should stay whole
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
    console.print(f"{what}: {summary}", markup=False, soft_wrap=True)
    return 1 if failed else 0


def _train(argv: list[str] | None) -> int:
    # of calls that LightningCLI makes; the user can't mend them
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

    from jsonargparse import set_loader
    from lightning.pytorch.cli import LightningCLI

    # imported so that --trainer.callbacks+=ThanosPruningCallback and --model CausalLM need no path
    import thanos_lightning.callback
    import thanos_lightning.lm  # noqa: F401

    loader, error = _yaml_loader()
    set_loader("yaml_without_sexagesimals", loader, exceptions=(error,))
    mode = {"parser_mode": "yaml_without_sexagesimals"}
    LightningCLI(
        save_config_kwargs={"overwrite": True},  # a second run in the same folder is no mistake
        parser_kwargs={**mode, **{name: dict(mode) for name in _TRAINER_COMMANDS}},
        args=argv,
    )
    _leave_ranks()
    return 0


def _leave_ranks() -> None:
    """End this process's part in the process group, which torch leaves to whoever runs the training.

    Otherwise a thread of Gloo may still hold a tensor while Python ends, and aborts a process that had done its work.
    Not called after an error: other ranks may be inside a collective, and this would wait for them.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()  # rank 0 keeps the store by which the others leave
        dist.destroy_process_group()


def _yaml_loader() -> tuple[Any, type[Exception]]:
    """A loader to which 2:4 is text, and the exception that it raises.

    YAML 1.1 reads an unquoted 2:4 as 124, a number to the base of 60, and 1e-4 as text. This one reads numbers as
    YAML 1.2 does.
    """
    import yaml  # type: ignore[import-untyped]

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Numbers as in YAML 1.2; no dates."""

        yaml_implicit_resolvers = {  # noqa: RUF012  # an attribute of PyYAML's
            first: [
                (tag, expression)
                for tag, expression in resolvers
                if tag.rpartition(":")[2] not in ("int", "float", "timestamp")
            ]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    integer = r"[-+]?(?:0b[01_]+|0[0-7_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)"
    floating = (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)"
    )
    # ints come second, as "12" is none of the floats
    for tag, expression in (("float", floating), ("int", integer)):
        Loader.add_implicit_resolver(
            f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{expression})$"), list("-+0123456789.")
        )

    def load(text: str) -> Any:
        return yaml.load(text, Loader)  # a SafeLoader

    return load, yaml.YAMLError


def _users_mistake(error: BaseException) -> BaseException | None:
    """The error to show in one line: one of ours or a misconfiguration, also where another one was raised from it."""
    kinds: tuple[type[BaseException], ...] = (ValueError, FileNotFoundError, ModuleNotFoundError)
    misconfiguration: tuple[type[BaseException], ...] = ()
    if "lightning" in sys.modules:
        from lightning.fabric.utilities.exceptions import MisconfigurationException

        misconfiguration = (MisconfigurationException,)
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, misconfiguration) or (isinstance(current, kinds) and _is_raised_by_us(current)):
            return current
        current = current.__cause__ or current.__context__
    return None


def _is_raised_by_us(error: BaseException) -> bool:
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    module: str = trace.tb_frame.f_globals.get("__name__", "")
    return module.partition(".")[0] == __package__
