"""Trains for as long as it is told, and kills ranks at random moments: python tests/distributed/soak.py MINUTES [SEED].

Each strategy has an equal share of the time, and two trainings at once, which are alike. One is never killed; it shows
whether memory, files and the time of the report grow. The other is killed and resumed: each of its steps has to have
the loss of the first one, to the last bit. Prints what it found, and ends with 1 where something was wrong.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import ranks

STRATEGIES: dict[str, dict[str, Any]] = {
    "auto": {},
    "fsdp": {"configure_model": True},
    "zero3": {"precision": "bf16-mixed"},
}
EVENTS = range(0, 20000, 25)
CHECKPOINT = "last.ckpt"
PROMPT = 150  # seconds in which ranks end after another one was killed
GROWTH = 256  # MiB; kernels of ever new shapes are kept, which takes some
OWN = ("log", "told", "seen")  # the files that the soak itself writes


def main(told: str) -> None:
    """Train on one rank, and note each step and each event."""
    import psutil
    import torch
    import training
    from lightning.pytorch import Callback
    from lightning.pytorch.callbacks import ModelCheckpoint
    from toy import ResumableBatches, trainer

    from thanos_lightning import CalibrationOptions, SparsitySchedule, ThanosPruningCallback
    from thanos_lightning.report.data import PruningReport

    arguments = json.loads(Path(told).read_text())
    case = training.Case(**arguments["case"])
    out, rank = Path(case.out), os.environ["RANK"]
    seen = os.open(out / f"seen{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    spent: list[float] = [0.0]
    write = PruningReport.write

    def timed(self: PruningReport, path: Path) -> None:
        begin = time.process_time()
        write(self, path)
        spent.append(time.process_time() - begin)

    PruningReport.write = timed  # type: ignore[method-assign]

    class Seen(Callback):
        events = 0

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
            os.write(seen, f"step {trainer.global_step} {outputs['loss'].item().hex()}\n".encode())
            if len(pruning.report.events) > self.events:
                self.events = len(pruning.report.events)
                files = sum(1 for file in out.rglob("*") if not file.name.startswith(OWN))
                memory = psutil.Process().memory_info().rss // 2**20
                os.write(seen, f"event {memory} {files} {spent[-1]}\n".encode())

    torch.set_num_threads(1)
    torch.manual_seed(0)
    alone = case.strategy == "auto"
    batches = {"batches": ResumableBatches(16).batches, "block_steps": 2} if alone else {"steps": 3}
    pruning = ThanosPruningCallback(
        "unstructured",
        0.8,
        SparsitySchedule(at=EVENTS[0 if alone else 1 :]),
        calibration=CalibrationOptions(**batches),
        verify_every_n_steps=5,
    )
    saving = ModelCheckpoint(out, Path(CHECKPOINT).stem, every_n_train_steps=10, enable_version_counter=False)
    fit = trainer(
        out,
        *(pruning, Seen(), saving),
        max_steps=10**6,  # by epochs Lightning 2.6 loses the place in the data at some second resumes
        devices=training.WORLD_SIZE,
        strategy=training.make_strategy(case),
        precision=case.precision,
        use_distributed_sampler=False,
        enable_checkpointing=True,
    )
    fit.fit(training.Module(case), ckpt_path=arguments["resume"])


class Training:
    """The ranks of a training, and what they have noted."""

    def __init__(self, out: Path, strategy: str) -> None:
        self.out, self.strategy = out, strategy
        self.ranks = 1 if strategy == "auto" else 2
        self.processes: Any = None
        out.mkdir(parents=True)

    def start(self) -> None:
        checkpoint, told = self.out / CHECKPOINT, self.out / "told.json"
        resume = str(checkpoint) if any(self.out.glob(f"*{CHECKPOINT}*")) else None
        case = {"out": str(self.out), "strategy": self.strategy, **STRATEGIES[self.strategy]}
        told.write_text(json.dumps({"case": case, "resume": resume}))
        logs = [self.out / f"log{rank}.txt" for rank in range(self.ranks)]
        before, end = len(self.noted("step")), time.monotonic() + ranks.PATIENCE
        self.processes = ranks.Processes("soak", logs, [str(told)] * self.ranks)
        while len(self.noted("step")) == before:  # who is killed while DeepSpeed is built leaves a lock
            self.check()
            if time.monotonic() > end:
                raise RuntimeError(f"{self.out} takes no step")
            time.sleep(0.1)

    def end(self) -> None:
        if self.processes is not None:
            self.processes.kill()

    def check(self) -> None:
        if any(code is not None for code in self.processes.codes()):
            said = [(self.out / f"log{rank}.txt").read_text(errors="replace")[-2000:] for rank in range(self.ranks)]
            raise RuntimeError("\n".join([f"{self.out} ended by itself", *said]))

    def kill_one(self, chance: random.Random) -> None:
        """Kill one rank; the others end by themselves."""
        os.kill(chance.choice(self.processes.pids), 9)
        end = time.monotonic() + PROMPT
        while None in self.processes.codes():
            if time.monotonic() > end:
                raise RuntimeError(f"{self.out}: a rank was killed, and another one has not ended in {PROMPT} s")
            time.sleep(0.02)

    def noted(self, what: str, rank: int = 0) -> list[list[str]]:
        file = self.out / f"seen{rank}"
        lines = file.read_text().splitlines() if file.exists() else []
        return [line.split()[1:] for line in lines if line.startswith(what)]


def soak(strategy: str, seconds: float, chance: random.Random, root: Path) -> list[str]:
    """Train for so long; what was wrong."""
    from thanos_lightning import verify_checkpoint

    whole, killed = trainings = [Training(root / strategy / name, strategy) for name in ("whole", "killed")]
    kills = 0
    try:
        for training in trainings:
            training.start()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            until = min(end, time.monotonic() + chance.uniform(0, 20))
            while time.monotonic() < until:
                whole.check()
                killed.check()
                time.sleep(0.1)
            killed.kill_one(chance)
            kills += 1
            killed.start()
    finally:
        for training in trainings:
            training.end()
    wrong, taken, again = [], 0, 0
    for rank in range(whole.ranks):
        losses = dict(whole.noted("step", rank))
        steps = [(step, loss) for step, loss in killed.noted("step", rank) if step in losses]
        taken, again = taken + len(steps), again + len(steps) - len({step for step, _ in steps})
        if others := [step for step, loss in steps if losses[step] != loss]:
            wrong.append(f"rank {rank} has another loss in {len(others)} steps, the first one {others[0]}")
    if not again:
        wrong.append("no step was taken again: take more time")
    is_read = strategy != "fsdp"  # of whose folders nothing but a training reads weights
    if is_read and not all(report.ok for report in verify_checkpoint(killed.out / CHECKPOINT)):
        wrong.append("the checkpoint of the killed training does not conform")
    memory, files, seconds_of_report = (list(map(float, one)) for one in zip(*whole.noted("event"), strict=True))
    files_of_killed = [int(files) for _, files, _ in killed.noted("event")]
    quarter = len(memory) // 4
    if memory[-1] - memory[quarter] > GROWTH:
        wrong.append("memory grows")
    if min(files_of_killed[-3:]) > max(files):
        wrong.append("kills leave files")
    early, late = (1e3 * fmean(part) for part in (seconds_of_report[: quarter + 1], seconds_of_report[-quarter - 1 :]))
    print(  # noqa: T201
        f"{strategy}: {len(memory)} events and {len(whole.noted('step'))} steps unkilled; {kills} kills, {taken} steps "
        f"compared, {again} of them taken again; memory {memory[quarter]:.0f}, then {memory[-1]:.0f} MiB; at most "
        f"{max(files):.0f} files, {max(files_of_killed)} where killed; report {early:.1f}, then {late:.1f} ms an "
        f"event; {'; '.join(wrong) or 'nothing wrong'}",
        flush=True,
    )
    return wrong


if __name__ == "__main__":
    minutes, seed = float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(10**6)
    print(f"seed {seed}")  # noqa: T201
    root = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        wrong = [
            soak(strategy, 60 * minutes / len(STRATEGIES), random.Random(f"{seed} {strategy}"), root)
            for strategy in STRATEGIES
        ]
    finally:
        ranks.end_pools()
    if any(wrong):
        sys.exit(f"the trainings are in {root}")
    shutil.rmtree(root)
