"""thanos-lightning: train with a YAML file, verify the zeros of a checkpoint, export it, and what goes with these.

Training is LightningCLI and imports Lightning; verify and export don't, so that they start at once.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Sequence

from thanos_lightning.cli.commands import TRAINER_COMMANDS, command_parser
from thanos_lightning.cli.mistakes import DEBUG, PROGRAM, users_mistake
from thanos_lightning.cli.noise import silence
from thanos_lightning.report.progress import TERMINATED

INTERRUPTED = 130  # what a shell says of a process that Ctrl-C ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments after the program's name; those of the process by default.

    Returns:
        The exit status: 0; 1 where tensors do not conform, or for an error of the program, after its traceback; 2 for a
        user's mistake, after one line; 130 after Ctrl-C; 141 where nobody reads the output; 143 after SIGTERM.

    Raises:
        SystemExit: For --help and --version, and where the arguments of a command other than the Trainer's are wrong.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    silence()
    try:
        # LightningCLI takes configuration files of several commands before the command
        if arguments and (arguments[0] in TRAINER_COMMANDS or re.match(r"(-c|--config)(=|$)", arguments[0])):
            from thanos_lightning.cli.training import train  # and Lightning with it

            return train(arguments)
        parsed = vars(command_parser().parse_args(arguments))
        command = parsed.pop("run")
        status: int = command(**parsed)
        return status
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as ended:
        if isinstance(ended.__context__, KeyboardInterrupt):  # Lightning's, after it has shut down what it runs
            return _interrupted()
        if type(ended).__name__ == "SIGTERMException":  # Lightning's, at a batch's end: its status would be 0
            return TERMINATED
        raise
    except BrokenPipeError:  # of `thanos-lightning recipes | head`
        sys.stdout = open(os.devnull, "w")  # for the flush when Python ends  # noqa: SIM115
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


def _interrupted() -> int:
    sys.stderr.write(f"{PROGRAM}: interrupted\n")
    return INTERRUPTED


def _rank() -> str:
    """Which process speaks, where it isn't the first of several."""
    ranks = (os.environ.get(name) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))
    rank = next((rank for rank in ranks if rank is not None), "0")
    return "" if rank == "0" else f"rank {rank}: "
