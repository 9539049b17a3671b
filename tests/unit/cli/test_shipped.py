import subprocess
import sys

import pytest

from thanos_lightning.cli import main
from thanos_lightning.cli.parsing import headline, launch_files, recipes


def test_all_are_listed_with_their_first_sentence(capsys):
    assert main(["recipes"]) == 0
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  "))
    assert {"quickstart", "llama-3.1-70b-2of4-zero3-multinode"} <= set(recipes())
    assert {"slurm.sh", "torchrun.sh", "deepspeed.sh", "hostfile"} <= set(launch_files())
    assert set(listed) == {*recipes(), *launch_files()}
    assert listed["quickstart"].startswith("SmolLM2-135M-Instruct to 2:4 on a CPU")
    assert listed["slurm.sh"] == "Train under Slurm, from the repository's folder"


def test_a_sentence_of_two_lines(tmp_path):
    (tmp_path / "a.yaml").write_text("#!/bin/sh\n# Llama 3.1 to\n# 2:4. And more.\n#\n# Other.\na: 1\n")
    assert headline(tmp_path / "a.yaml") == "Llama 3.1 to 2:4"


@pytest.mark.parametrize(("name", "file"), [("quickstart", "recipes/quickstart.yaml"), ("slurm.sh", "launch/slurm.sh")])
def test_one_is_copied(capsys, pytestconfig, name, file):
    assert main(["recipes", name]) == 0
    assert capsys.readouterr().out == (pytestconfig.rootpath / file).read_text()


def test_a_reader_that_has_enough():
    command = f"{sys.executable} -m thanos_lightning recipes llama-3.1-8b-2of4 | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) in ((0, ""), (141, ""))  # 0 where it was written before the reader ended
