"""What torchrun starts: processes that find each other, one of which writes and prints."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
from pathlib import Path
import numpy as np
from families import family
from relufy.method import Relufication
from relufy.recipe import Finetune, Recipe
from relufy.processes import is_main, join_processes, leave_processes, num_processes
from relufy.train.run import Run, run_recipe
from relufy.cli.quiet import quiet_libraries

quiet_libraries()
join_processes()
finetune = Finetune(steps=3, batch_size=4, window=8, distill=1.0)
windows = np.random.default_rng(0).integers(1, 53, (16, 8))
run = Run(Path(sys.argv[1]), None, lambda _: windows, teacher=family("llama"), shard="--shard" in sys.argv)
done = run_recipe(family("llama"), Recipe("one", sparsify=Relufication(), finetune=finetune), run)
if is_main():
    print(json.dumps([num_processes(), *done[0].losses]))
leave_processes()
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torch.distributed.run", "accelerate.commands.launch"])
def test_launchers_start_one_run(tmp_path: Path, launcher: str) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    options = {
        "torch.distributed.run": ["--standalone", "--nproc_per_node", "2"],
        "accelerate.commands.launch": ["--multi_gpu", "--num_processes", "2", "--num_machines", "1"],
    }
    command = [sys.executable, "-m", launcher, *options[launcher], "script.py", "out", "--shard"]
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "HF_HOME": str(tmp_path / "hf"),
    }
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    processes, *losses = json.loads(line)
    assert processes == 2 and len(losses) == 3
    assert (tmp_path / "out" / "model.safetensors").is_file()
