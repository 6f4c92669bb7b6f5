"""KTO, SFT, ORPO, CPO and reward models on images, end to end, against each sequence alone with its images."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForImageTextToText, Gemma3Config, Gemma3ForSequenceClassification

import tether
from tether.data import prepare
from tether.errors import ConfigError, ScoringError
from tether.models.structure import evaluation_mode
from tether.scoring import pack, score
from tether.scoring.batch import with_prompts
from tether.scoring.layout.proof import score_alone
from tether.training.algorithms import kto_mismatch
from tiny_vision import VISION, picture, tiny_processor, tiny_vision, tiny_vision_reward, vision_examples
from training import plain

WORDS = ["good", "bad", "a long and winding film", "not what I liked", "fine", "dull"]


def said(word):
    return [{"role": "assistant", "content": word}]


def rows(kind, count=6, shift=0):
    """One image or two, of several sizes; most rows ask in the same words, and differ in their images alone."""
    found = []
    for i in range(count):
        row = {
            "images": [picture(i + k + shift, 16 + 8 * (i % 2), 16) for k in range(1 + i % 2)],
            "prompt": [{"role": "user", "content": "the film was"}],
        }
        chosen, rejected = said(WORDS[i % 6]), said(WORDS[(i + 1) % 6])
        match kind:
            case "KTO":
                row |= {"completion": chosen, "label": bool(i % 3)}
            case "SFT":
                row |= {"completion": chosen}
            case _:
                row |= {"chosen": chosen, "rejected": rejected}
        found.append(row)
    return found


def build(folder, kind, family, *, data=None, **arguments):
    config = getattr(tether, f"{kind}Config")
    settings = plain.settings(config, 6, arguments)
    make = tiny_vision_reward if kind == "Reward" else tiny_vision
    return getattr(tether, f"{kind}Trainer")(
        model=arguments.pop("model", None) or make(family),
        args=config(output_dir=str(folder), **settings),
        train_dataset=rows(kind) if data is None else data,
        processing_class=arguments.pop("processing_class", None) or tiny_processor(family),
        **arguments,
    )


def plain_rows(kind, family, shift=0):
    """The rows as the processor makes them by itself."""
    processor, found = tiny_processor(family), []
    for row in rows(kind, shift=shift):
        parts = [{"type": "image"}] * len(row["images"]) + [{"type": "text", "text": row["prompt"][0]["content"]}]
        asked = [{"role": "user", "content": parts}]
        text = processor.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        given = processor(text=[text], images=[row["images"]], return_tensors="pt")
        answers = [row[name][0]["content"] for name in ("completion", "chosen", "rejected") if name in row]
        ids = [processor.tokenizer(f"{answer}<|im_end|>")["input_ids"] for answer in answers]
        found.append(plain.Row(dict(given), ids, row.get("label", True)))
    return found


def losses(run):
    return [log["loss"] for log in run.state.log_history if "loss" in log]


ORACLES = {
    "KTO": (plain.kto, plain.decoder_logps),
    "SFT": (plain.sft, plain.decoder_logps),
    "Reward": (plain.reward, plain.rewards),
}


@pytest.mark.parametrize("family", VISION)
@pytest.mark.parametrize("kind", ORACLES)
@pytest.mark.sweep(1)
def test_steps_and_evaluation_are_those_of_each_sequence_alone(kind, family, tmp_path):
    """INV-16, 41: losses of three steps and of an evaluation; KTO's unrelated completion stands under the row's own
    images. The controls are other pixels, and none for the rows of the KL estimate."""
    loss, one = ORACLES[kind]
    model = tiny_vision_reward(family) if kind == "Reward" else tiny_vision(family)
    other = tiny_vision(family, seed=5) if kind == "KTO" else None
    expected = plain.descend(loss, one, model, other, plain_rows(kind, family), plain.STEPS)
    more = {"ref_model": tiny_vision(family, seed=5)} if other is not None else {}
    run = build(tmp_path, kind, family, eval_dataset=rows(kind), **more)
    run.train()
    assert run.run.layout == "tree"
    assert losses(run) == pytest.approx(expected[:-1], abs=2e-5)
    assert run.evaluate()["eval_loss"] == pytest.approx(expected[-1], abs=2e-5)
    elsewhere = build(tmp_path, kind, family, data=rows(kind, shift=50), **more)
    elsewhere.train()
    assert losses(elsewhere)[0] != pytest.approx(expected[0], abs=1e-4)


@pytest.mark.slow
def test_the_kl_estimate_is_of_the_rows_own_images(tmp_path, monkeypatch):
    """INV-15, 41: a row keeps its images, rows that differ in these alone have prompts of their own, and rows that
    lost them are noticed: the control puts the fault back that was here."""
    run = build(tmp_path, "KTO", "llava", ref_model=tiny_vision("llava", seed=5))
    digests = {run.train_dataset[i]["image_inputs"].digest for i in range(6)}
    assert len(digests) == 6
    own = [pair[0] for pair in run.train_dataset["completion_ids"]]
    assert [pair[1] for pair in run.train_dataset["completion_ids"]] == [own[-1], *own[:-1]]
    run.train()

    def forgets(prepared, max_length):
        made = kto_mismatch.with_mismatched(prepared, max_length)
        return kto_mismatch.replace(made, dataset=made.dataset.with_format(None).remove_columns("images"))

    monkeypatch.setattr("tether.training.algorithms.kto.with_mismatched", forgets)
    blind = build(tmp_path, "KTO", "llava", ref_model=tiny_vision("llava", seed=5))
    blind.train()
    assert losses(blind)[0] != pytest.approx(losses(run)[0], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["KTO", "SFT", "ORPO", "CPO", "Reward"])
def test_layouts_and_splits_train_alike(kind, tmp_path):
    """INV-19, 25: tree and padded, one forward and several, in the family whose positions follow the image."""
    runs = []
    for settings in (
        {},
        {"scoring_layout": "padded"},
        {"max_tokens_per_forward": 80},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
    ):
        runs.append(build(tmp_path, kind, "qwen2_vl", **settings))
        runs[-1].train()
    for run in runs[1:]:
        assert losses(run) == pytest.approx(losses(runs[0]), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", VISION)
def test_kto_with_a_store_and_several_evaluation_sets(family, tmp_path):
    """INV-12, 13, 15: stored equals live; nothing is computed a second time; other images are other entries."""
    sets = {"first": rows("KTO")[:3], "second": rows("KTO", shift=9)[:4]}
    more = {"ref_model": tiny_vision(family, seed=5), "eval_dataset": sets}
    live = build(tmp_path / "live", "KTO", family, **more)
    live.train()
    found = []
    for _ in range(2):
        run = build(tmp_path / "run", "KTO", family, reference_store=str(tmp_path / "store"), **more)
        filled = run.precompute_reference()
        run.train()
        found.append((filled.computed, losses(run)))
    # Images are a part of the keys; rows that the sets share are computed once.
    assert found[0][0] == len({key for part in keys_of(live) for key in part})
    assert found[1][0] == 0
    assert found[0][1] == found[1][1] == losses(live)
    first, second = live.evaluate(), run.evaluate()
    names = [name for name in first if name.endswith(("_loss", "_kl"))]
    assert len(names) == 4
    assert [second[name] for name in names] == pytest.approx([first[name] for name in names], rel=1e-5)


def keys_of(run):
    from tether.data import example_from_row

    for data in (run.train_dataset, *run.eval_dataset.values()):
        yield from (example_from_row(data[i]).keys for i in range(len(data)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["KTO", "SFT"])
def test_a_resumed_run_and_what_it_leaves(kind, tmp_path):
    """INV-7, 38."""
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "per_device_train_batch_size": 3}
    whole = build(tmp_path / "whole", kind, "llava", **saving)
    whole.train()
    rest = build(tmp_path / "rest", kind, "llava", **saving)
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, value in whole.policy.state_dict().items():
        assert torch.equal(value, rest.policy.state_dict()[name]), name
    rest.save_model()
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "rest").eval()
    with torch.no_grad(), evaluation_mode(rest.policy):
        expected = score(rest.policy, rest.run.probe).token_logps
        torch.testing.assert_close(score(again, rest.run.probe).token_logps, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("layout", ["tree", "padded"])
@pytest.mark.parametrize("family", VISION)
def test_prompts_are_scored_without_the_tokens_of_images(family, layout):
    """What ORPO, and SFT on whole texts, add to the completions."""
    model, examples = tiny_vision(family).eval(), vision_examples(family)
    batch = with_prompts(pack(examples))
    types = [torch.zeros(len(e.prompt_ids)) if e.images is None else e.images.token_types for e in examples]
    expected = [e.prompt_ids[1:][kind[1:] == 0].tolist() for e, kind in zip(examples, types, strict=True)]
    of_prompts = batch.completion_index >= len(batch.branches)
    assert batch.targets[of_prompts].tolist() == [token for ids in expected for token in ids]
    assert any(kind.any() for kind in types)
    with torch.no_grad():
        found = score(model, batch, layout=layout).token_logps
        torch.testing.assert_close(found, score_alone(model, batch), atol=2e-5, rtol=0)


def test_a_reward_model_over_images_that_transformers_has(tmp_path):
    """INV-38: Gemma 3 by name, its head new; saved, loaded in plain transformers, and asked with images."""
    from tether.scoring.reward import reward, reward_alone

    processor = tiny_processor("llava")
    token = processor.tokenizer.convert_tokens_to_ids("<image>")
    text = {**tiny_vision("llava").config.get_text_config().to_dict(), "head_dim": 8, "query_pre_attn_scalar": 8}
    text = {name: text[name] for name in (*TEXT_SIZES, "head_dim", "query_pre_attn_scalar")}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = Gemma3Config(
        text_config=text,
        vision_config={**vision, "image_size": 16, "patch_size": 4},
        mm_tokens_per_image=16,
        image_token_index=token,
    )
    config.num_labels = 1
    torch.manual_seed(0)
    Gemma3ForSequenceClassification(config).save_pretrained(tmp_path / "model")
    run = build(
        tmp_path / "run", "Reward", "llava", model=str(tmp_path / "model"), processing_class=processor, max_steps=2
    )
    run.train()
    run.save_model()
    again = Gemma3ForSequenceClassification.from_pretrained(tmp_path / "run").eval()
    with torch.no_grad(), evaluation_mode(run.policy):
        torch.testing.assert_close(
            reward(run.policy, run.run.probe, layout=run.run.layout), reward_alone(again, run.run.probe)
        )


TEXT_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"),
)


def test_reward_models_that_cannot_be_are_refused_before_rows_are_read(tmp_path, monkeypatch):
    """By name before weights load; in memory by the head that is missing."""
    tiny_vision("qwen2_vl").save_pretrained(tmp_path / "model")
    monkeypatch.setattr(
        "tether.training.algorithms.reward.load_reward_model", lambda *_, **__: pytest.fail("weights were loaded")
    )
    with pytest.raises(ConfigError, match="no sequence classifier for Qwen2VLConfig"):
        build(tmp_path, "Reward", "qwen2_vl", model=str(tmp_path / "model"))
    with pytest.raises(ScoringError, match="no head called `score`"):
        build(tmp_path, "Reward", "qwen2_vl", model=tiny_vision("qwen2_vl"), data="nowhere.jsonl")


def test_pairs_with_images_as_labelled_rows():
    """Each of the two rows has the images of its pair."""
    prepared = prepare(Dataset.from_list(rows("CPO", 3)), tiny_processor("llava"), max_length=None, kind="unpaired")
    found = kto_mismatch.with_mismatched(prepared, None).dataset
    digests = [found[i]["image_inputs"].digest for i in range(6)]
    assert digests[0::2] == digests[1::2]
    assert len(set(digests)) == 3
