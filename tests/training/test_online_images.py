"""Prompts with images: completions are sampled by `generate`, scored with their images, and judged beside them."""

from __future__ import annotations

import json
import shutil

import pyarrow.parquet as parquet
import pytest
import torch
from datasets import Dataset

from tether import GRPOConfig, GRPOTrainer, OnlineDPOConfig, OnlineDPOTrainer
from tether.errors import ConfigError
from tether.rollout import Sampling
from tether.rollout.sample import draw
from tiny_vision import VISION, picture, tiny_processor, tiny_vision
from training.online import SETTINGS, steps, weights

CONTENT = [{"type": "image"}, {"type": "text", "text": "what is it"}]
ROWS = [
    {
        "prompt": [{"role": "user", "content": CONTENT if k % 4 < 3 else CONTENT[1:]}],
        "images": [picture(k, 16 + 8 * (k % 3), 16)] if k % 4 < 3 else [],
    }
    for k in range(8)
]


def bright(completion_ids, images, **_):
    """Of the row's images; the sampled ids as well, so that groups have variance."""
    assert all(len(one) in (0, 1) for one in images)
    return [sum(i % 2 for i in ids) / len(ids) for ids in completion_ids]


def trained(folder, family, kinds=(GRPOTrainer, GRPOConfig), *, rows=ROWS, resume=None, **changes):
    made = kinds[0](
        tiny_vision(family),
        bright,
        kinds[1](output_dir=str(folder), **{**SETTINGS, "max_steps": 2, "beta": 0.1, **changes}),
        Dataset.from_list(rows),
        processing_class=tiny_processor(family),
    )
    made.train(resume_from_checkpoint=resume)
    return made


@pytest.mark.parametrize("family", VISION)
@pytest.mark.sweep(1)
def test_completions_are_sampled_and_scored_with_their_images(family, tmp_path, caplog):
    """R2, R5, R24: the proof compares engine and trainer on prompts with images; KL 0 at the first step; another image
    gives other completions; a run that goes on between two updates of a rollout reads its images again."""
    settings = {"num_iterations": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 3}
    with caplog.at_level("INFO", "tether"):
        made = trained(tmp_path / "run", family, **settings)
    assert "rollouts: transformers engine, at most" in caplog.text
    logs = steps(made)
    assert logs[0]["kl"] == 0.0
    assert logs[1]["kl"] > 0.0
    assert logs[0]["sampling/kept_mass"] < 1.0
    kept = [parquet.read_table(tmp_path / f"run/rollouts/00000{k}-0.parquet").to_pylist() for k in (0, 1)]
    placeholder = made.processing_class.image_token_id
    assert any(placeholder in row["prompt_ids"] for row in kept[0])
    assert not any(placeholder in row["completion_ids"] for one in kept for row in one)
    assert all("images" not in json.loads(row["row"]) for row in kept[0])
    other = [{**row, "images": [picture(50 + k, 16, 16)] * len(row["images"])} for k, row in enumerate(ROWS)]
    if family == "llava":  # whose images all take as many tokens
        changed = trained(tmp_path / "other", family, rows=other, max_steps=1)
        theirs = parquet.read_table(tmp_path / "other/rollouts/000000-0.parquet").to_pylist()
        assert [row["prompt_ids"] for row in theirs] == [row["prompt_ids"] for row in kept[0]]
        assert [row["completion_ids"] for row in theirs] != [row["completion_ids"] for row in kept[0]]
        assert steps(changed)[0]["kl"] == 0.0
    (tmp_path / "again").mkdir()
    shutil.copytree(tmp_path / "run/checkpoint-3", tmp_path / "again/checkpoint-3")
    again = trained(tmp_path / "again", family, resume=True, **settings)
    for name, value in weights(made).items():
        assert torch.equal(value, weights(again)[name]), name


def test_pairs_have_images_and_engines_without_them_are_refused(tmp_path):
    made = trained(tmp_path / "pairs", "llava", (OnlineDPOTrainer, OnlineDPOConfig), max_steps=1)
    batch = made.run.source._held[1][0]
    assert [one.images is None for one in batch] == [
        made.processing_class.image_token_id not in one.prompt_ids for one in batch
    ]
    assert any(one.images is not None for one in batch)
    for engine, why in (("tree", "does not read images"), ("vllm", "is given token ids alone")):
        server = {"vllm_server_base_url": "http://127.0.0.1:1"} if engine == "vllm" else {}
        with pytest.raises(ConfigError, match=f"rollout_engine is '{engine}', and the prompts have images: it {why}"):
            trained(tmp_path / engine, "llava", rollout_engine=engine, **server)


def test_some_tokens_are_never_drawn_and_log_probs_are_before_that():
    logits = torch.tensor([[5.0, 0.0, 0.0], [5.0, 1.0, 0.0]])
    for place in range(20):
        drawn = draw(logits, [b"one", b"two"], place, Sampling(1.0, 4, (), never=(0,)))
        assert 0 not in drawn.ids.tolist()
        torch.testing.assert_close(drawn.logps, logits.log_softmax(-1).gather(-1, drawn.ids[:, None])[:, 0])
        torch.testing.assert_close(drawn.kept, 1 - logits.softmax(-1)[:, 0])
