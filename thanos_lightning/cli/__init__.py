"""The command thanos-lightning: train from a YAML file, verify the zeros of a checkpoint, export it, and more.

Training runs LightningCLI and imports Lightning. verify and export do not import it, so that they start at once.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence

from thanos_lightning.cli.commands import TRAINER_COMMANDS, command_parser
from thanos_lightning.cli.mistakes import DEBUG, PROGRAM, users_mistake
from thanos_lightning.cli.parsing import require_checkpoint, with_recipes
from thanos_lightning.report.progress import TERMINATED, Terminated

INTERRUPTED = 130  # exit status in a shell of a process that Ctrl-C ended
# Messages of other packages that the user cannot act on, each by its own words
_WARNINGS = (
    r".*LeafSpec.* is deprecated",  # torch, about a call that Lightning makes
    r".torch\.distributed\.\w+. is deprecated",  # torch, about calls that DeepSpeed makes
    r"Precision .* is not supported by the model summary",  # it concerns sizes in MB
    r".*does not have many workers",  # packed blocks come from memory
)
_MESSAGES = (
    re.compile(r"^💡 Tip"),
    re.compile(r"^(TPU|HPU) available: False"),
    re.compile(r"^Setting accelerator to CPU\. If you have GPU or other accelerator"),  # DeepSpeed, when it is imported
)
_LOGGERS = ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch", "DeepSpeed")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with the arguments after the program's name, by default those of the process.

    Returns:
        The exit status: 0; 1 if tensors do not conform, or after the traceback of a program error; 2 after one line
        about a user's mistake; 130 after Ctrl-C; 141 if nobody reads the output; 143 after SIGTERM.

    Raises:
        SystemExit: For --help and --version, and if the arguments of a command other than the Trainer's are wrong.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    silence()
    try:
        # LightningCLI also takes --config before the command, for a file that configures several commands.
        if arguments and (arguments[0] in TRAINER_COMMANDS or re.match(r"(-c|--config)(=|$)", arguments[0])):
            with_recipes(arguments)  # a wrong name is refused before all that is loaded
            require_checkpoint(arguments)
            if arguments[0] == "fit" and not _rank() and not {"-h", "--help", "--print_config"} & {*arguments}:
                sys.stdout.write("Starting: torch and Lightning are loaded first\n")  # which takes several seconds
                sys.stdout.flush()
            from thanos_lightning.cli.training import train  # imports Lightning

            return train(arguments)
        parser = command_parser()
        known, of_fit = parser.parse_known_args(arguments)
        parsed = vars(known)
        command = parsed.pop("run")
        if arguments[0] == "plan":
            with_recipes(of_fit)
            parsed["arguments"] = of_fit
        elif of_fit:
            parser.error(f"unrecognized arguments: {' '.join(of_fit)}")
        status: int = command(**parsed)
        return status
    except KeyboardInterrupt:
        return _ended("interrupted", INTERRUPTED)
    except SystemExit as ended:
        if isinstance(ended.__context__, KeyboardInterrupt):  # Lightning raises it after its shutdown
            return _ended("interrupted", INTERRUPTED)
        # Lightning raises its own exception at a batch's end, with status 0
        if isinstance(ended, Terminated) or type(ended).__name__ == "SIGTERMException":
            return _ended("ended by SIGTERM", TERMINATED)
        raise
    except BrokenPipeError:  # as in `thanos-lightning recipes | head`
        sys.stdout = open(os.devnull, "w")  # Python flushes it at the end  # noqa: SIM115
        return 141
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        mistake = users_mistake(error)
        if mistake is None:
            traceback.print_exc()
        said = "error: " + (mistake or "this may be a fault of the program: report it with the lines above")
        sys.stderr.write(f"{PROGRAM}: {_rank()}{said}\n")
        return 1 if mistake is None else 2


def _ended(how: str, status: int) -> int:
    sys.stderr.write(f"{PROGRAM}: {_rank()}{how}\n")
    return status


def _rank() -> str:
    """Return a prefix that names the rank; empty on the first rank."""
    ranks = (os.environ.get(name) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))
    rank = next((rank for rank in ranks if rank is not None), "0")
    return "" if rank == "0" else f"rank {rank}: "


def _is_ours_to_say(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(expression.search(message) for expression in _MESSAGES)


def silence() -> None:
    """Hide these messages in this process."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_is_ours_to_say)
