"""Two nodes, each an agent of torchrun with one process, with one run folder or one each (INV-25, INV-46)."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from faults.harness import Home
from tether.training.checkpoint import last_checkpoint
from tether.training.saving.atomic_checkpoint import damage

pytestmark = [pytest.mark.faults, pytest.mark.multiprocess]
_LIMIT = 200


@pytest.fixture
def home(nursery, tmp_path):
    """Its run file has absolute paths to all that is read, so that each node may be in a folder of its own."""
    made = Home(nursery, tmp_path / "home", "lora")
    run = yaml.safe_load((made.path / "run.yaml").read_text())
    run["data"] = {name: str(made.path / f"{name}.jsonl") for name in ("train", "eval")}
    run["train"]["save_total_limit"] = 2
    (made.path / "run.yaml").write_text(yaml.safe_dump(run))
    return made


class Nodes:
    """A run on two machines, as far as torchrun can tell; each begins in a folder, which its paths are relative to."""

    def __init__(self, home: Home, folders: list[Path], caches: list[Path], *more: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._said = [folder / f"said-{node}.txt" for node, folder in enumerate(folders)]
        self._agents = []
        for node, (folder, cache) in enumerate(zip(folders, caches, strict=True)):
            command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
            command += ["--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", str(port)]
            command += ["-m", "tether", "train", str(home.path / "run.yaml"), *more]
            environment = {
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "TETHER_CACHE": str(cache),
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
            }
            with self._said[node].open("w") as out:
                agent = subprocess.Popen(command, cwd=folder, stdout=out, stderr=subprocess.STDOUT, env=environment)
            self._agents.append(agent)

    def wait(self) -> tuple[list[int], list[str]]:
        """Exit codes of both, and what they said."""
        try:
            codes = [agent.wait(_LIMIT) for agent in self._agents]
        finally:
            for agent in self._agents:
                if agent.poll() is None:
                    agent.kill()
        return codes, [path.read_text() for path in self._said]


def test_two_nodes_with_one_folder_train_log_save_and_resume(home, tmp_path):
    """Also where each has a cache of prepared rows of its own."""
    caches = [tmp_path / "cache-0", tmp_path / "cache-1"]
    shared = [home.path, home.path]
    codes, said = Nodes(home, shared, caches).wait()
    assert codes == [0, 0], said
    assert all(list(cache.rglob("*.arrow")) for cache in caches)
    for name in ("checkpoint-4", "checkpoint-6"):
        assert damage(home.out / name) == ""
        assert {path.name for path in (home.out / name).glob("rng_state_*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    shutil.copytree(home.out, home.whole)
    for path in (*home.out.glob("checkpoint-6"), *home.out.glob("*.safetensors")):
        path.rename(tmp_path / f"away-{path.name}")
    codes, said = Nodes(home, shared, caches, "--resume").wait()
    assert codes == [0, 0], said
    home.require_same("from checkpoint-4")


def test_nodes_whose_folders_are_not_one_are_told_so_or_have_a_whole_run_each(home, tmp_path):
    """The relative name `out` is another folder on each."""
    places = [tmp_path / "node-0", tmp_path / "node-1"]
    for place in places:
        place.mkdir()
    caches = [tmp_path / "cache"] * 2
    codes, said = Nodes(home, places, caches).wait()
    assert all(codes)
    for text in said:
        assert "output_dir is 'out', which for rank 1 on" in text
        assert "did not expect" not in text
    assert not list(places[1].rglob("*.safetensors"))

    own = ("train.save_on_each_node=true",)
    codes, said = Nodes(home, places, caches, *own).wait()
    assert codes == [0, 0], said
    for place in places:
        assert damage(place / "out" / "checkpoint-6") == ""
        assert (place / "out" / "adapter_model.safetensors").is_file()
    home.whole = Path(shutil.copytree(places[0] / "out", tmp_path / "whole"))
    # The second node had not named its last checkpoint when both were killed.
    for node, place in enumerate(places):
        (place / "out" / "adapter_model.safetensors").unlink()
        if node:
            (place / "out" / "checkpoint-6").rename(tmp_path / "away")
    codes, said = Nodes(home, places, caches, *own, "--resume").wait()
    assert all(codes)
    assert any("different checkpoints (rank 0 checkpoint-6, rank 1 checkpoint-4)" in text for text in said), said
    assert last_checkpoint(places[1] / "out") is not None
    codes, said = Nodes(home, places, caches, *own, "--resume", "out/checkpoint-4").wait()
    assert codes == [0, 0], said
    home.out = places[0] / "out"
    home.require_same("from checkpoint-4 on both")

    codes, said = Nodes(home, [home.path] * 2, caches, *own).wait()
    assert all(codes)
    assert all("is one folder for all nodes, in which each would write the same files" in text for text in said), said


def test_a_store_that_is_another_folder_on_each_node_is_told(home, tmp_path):
    run = yaml.safe_load((home.path / "run.yaml").read_text())
    run |= {"reference": {"store": "store"}, "output": str(tmp_path / "out")}
    (home.path / "run.yaml").write_text(yaml.safe_dump(run))
    places = [tmp_path / "node-0", tmp_path / "node-1"]
    for place in places:
        place.mkdir()
    codes, said = Nodes(home, places, [tmp_path / "cache"] * 2).wait()
    assert all(codes)
    assert all("The store is 'store', which for rank 1 on" in text for text in said), said
