"""DeepSpeed still notes on parameters what `tether.compat.deepspeed` reads there; one process, stage 3."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, os
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
import deepspeed, torch
from torch import nn
from tether.compat import deepspeed as places

torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
deepspeed.init_distributed("gloo")
CONFIG = {
    "train_batch_size": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "optimizer": {"type": "Adam", "params": {}},
}
with deepspeed.zero.Init(config_dict_or_path=CONFIG):
    model = nn.Sequential(nn.Linear(3, 5))
plain, (weight, bias) = nn.Linear(3, 5), model[0].parameters()
found = {
    "partitioned": [places.is_partitioned(weight), places.is_partitioned(plain.weight)],
    "away": [places.is_away(weight), places.is_away(plain.weight), weight.numel()],
    "sizes": [places.whole_size(weight), list(places.whole_shape(weight)), places.whole_size(plain.weight)],
    "shard": [places.shard_of(weight).numel(), places.shard_size(weight), places.is_only_copy(weight)],
    "group": torch.distributed.get_world_size(places.process_group(weight)),
}
places.gather([weight, bias])
found["gathered"] = [places.is_partitioned(weight), places.is_away(weight), list(weight.shape)]
with torch.no_grad():
    weight.fill_(2.0), bias.fill_(1.0)
places.partition([weight, bias])
found["written"] = [places.is_away(weight), places.shard_of(weight)[:15].tolist()]
found["before an engine"] = places.gathers_itself(model[0])
engine = places.inference_engine(model, CONFIG)
found["engine"] = [places.gathers_itself(model[0]), places.gathers_itself(plain), model.training]
found["forward"] = engine(torch.ones(1, 3)).tolist()
found["kept"] = "optimizer" in CONFIG


class Optimizer:
    bit16_groups = [[weight]]


found["groups"] = [len(places.parameter_groups(Optimizer())), places.parameter_groups(torch.optim.SGD([plain.weight]))]
print("FOUND", json.dumps(found))
"""
EXPECTED = {
    "partitioned": [True, False],
    "away": [True, False, 0],
    "sizes": [15, [5, 3], 15],
    "shard": [15, 15, True],
    "group": 1,
    "gathered": [True, False, [5, 3]],
    "written": [True, [2.0] * 15],
    "before an engine": False,
    "engine": [True, False, False],
    "forward": [[7.0] * 5],
    "kept": True,
    "groups": [1, []],
}


@pytest.mark.deepspeed
def test_stage_3_notes_shards_and_states_on_its_parameters():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300)
    line = next((line for line in done.stdout.splitlines() if line.startswith("FOUND ")), None)
    assert line, done.stderr[-3000:]
    assert json.loads(line.removeprefix("FOUND ")) == EXPECTED


@pytest.mark.deepspeed
@pytest.mark.parametrize("attribute", ["bit16_groups", "fp16_groups"])
def test_optimizers_of_deepspeed_have_their_groups_under_one_of_these_names(attribute):
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    module = {"bit16_groups": stage_1_and_2, "fp16_groups": stage3}[attribute]
    with open(module.__file__, encoding="utf-8") as file:
        assert f"self.{attribute} = [" in file.read()
