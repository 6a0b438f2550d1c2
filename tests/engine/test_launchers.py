"""What starts processes, by the real commands: torchrun and ``accelerate launch``, on one machine and as on two."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mtdiffusion_engine import checkpoint as ckpt
from mtdiffusion_engine.cli import main
from mtdiffusion_engine.environment import left_alone
from tests.engine.tiny import CONFIG

TORCHRUN = ("-m", "torch.distributed.run")
ACCELERATE = ("-m", "accelerate.commands.launch", "--mixed_precision", "no", "--dynamo_backend", "no")
ALONE = "warning: this is one process, though the environment's MASTER_ADDR is for several"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("launched") / "config.toml"
    path.write_text(CONFIG)
    return path


def start(launcher: Sequence[object], config: Path, run: Path) -> subprocess.Popen[str]:
    """A training by a launcher."""
    train = ["-m", "mtdiffusion_engine.cli", "train", config, "--out", run, "--resume", "--device", "cpu"]
    return subprocess.Popen(
        [sys.executable, *map(str, [*launcher, *train])],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def said(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out
    return out


def weights(run: Path) -> Mapping[str, torch.Tensor]:
    return load_file(ckpt.require_run(run) / "model.safetensors")


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def by_torchrun(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, torch.Tensor]:
    """The weights of a training in two processes that torchrun has started."""
    run = tmp_path_factory.mktemp("torchrun") / "run"
    assert "2 processes" in said(start([*TORCHRUN, "--standalone", "--nproc_per_node", 2], config, run))
    return weights(run)


@pytest.mark.long
def test_accelerate_launch_starts_two_processes_on_the_cpu_as_torchrun_does(
    config: Path, by_torchrun: Mapping[str, torch.Tensor], tmp_path: Path
) -> None:
    launcher = [*ACCELERATE, "--multi_gpu", "--num_processes", 2, "--num_machines", 1, "--main_process_port", 0]
    told = said(start(launcher, config, tmp_path / "run"))
    assert "on cpu, 2 processes" in told and ALONE not in told
    found = weights(tmp_path / "run")
    assert all(torch.equal(x, found[name]) for name, x in by_torchrun.items())


@pytest.mark.long
@pytest.mark.parametrize("how", ["--num_processes 2", "--cpu --num_processes 2", "MULTI_CPU"])
def test_who_asks_accelerate_launch_for_two_processes_and_gets_one_is_told(
    how: str, config: Path, tmp_path: Path
) -> None:
    asked = [*how.split(), "--num_machines", "1"]
    if how == "--num_processes 2" and torch.cuda.device_count() > 1:
        pytest.skip("where there are several GPUs, accelerate launch starts two")
    if how == "MULTI_CPU":
        file = tmp_path / "accelerate.yaml"
        file.write_text("distributed_type: MULTI_CPU\nuse_cpu: true\nnum_processes: 2\nnum_machines: 1\n")
        asked = ["--config_file", str(file)]
    told = said(start([*ACCELERATE, *asked], config, tmp_path / "run"))
    assert "on cpu, 1 process:" in told
    assert ALONE in told and "torchrun --nproc_per_node N -m mtdiffusion_engine.cli" in " ".join(told.split())


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_whoever_samples_or_evaluates_alone_is_told_as_well(
    command: str, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    asked = ["sample", run, "-n", 2, "--out", tmp_path / "out"] if command == "sample" else ["evaluate", run]
    arguments = [*map(str, asked), "--device", "cpu"]
    assert main(arguments) == 0
    assert ALONE not in capfd.readouterr().err
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert main(arguments) == 0
    assert ALONE in capfd.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_launchers_that_meet_train_one_run_as_on_two_machines(
    launcher: str, config: Path, by_torchrun: Mapping[str, torch.Tensor], tmp_path: Path
) -> None:
    port = free_port()
    started = []
    for machine in range(2):
        if launcher == "torchrun":
            meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "run"]
            how: list[object] = [*TORCHRUN, "--nnodes", 2, "--nproc_per_node", 1, *meeting]
        else:
            meeting = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
            how = [*ACCELERATE, "--multi_gpu", "--num_processes", 2, "--num_machines", 2, "--machine_rank", machine]
            how += meeting
        started.append(start(how, config, tmp_path / "run"))
    assert "2 processes" in "".join(said(each) for each in started)
    found = weights(tmp_path / "run")
    assert all(torch.equal(x, found[name]) for name, x in by_torchrun.items())


def test_one_process_of_accelerate_launch_is_told_if_it_was_to_be_one_of_several() -> None:
    launched = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    assert [said.startswith("this is one process") for said in left_alone(launched | meeting)] == [True]
    assert left_alone(launched) == []  # asked for one
    assert left_alone(meeting) == []  # a cluster's job
    for size in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"):
        assert left_alone(launched | meeting | {size: "2"}) == []
