"""Images in both layouts give what each sequence gives alone (INV-15, 16, 17, 19, 21)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tether.errors import ScoringError
from tether.scoring import choose_layout, pack, score, score_alone
from tether.scoring.layout import vision
from tether.types import ImageInputs
from tiny_vision import VISION, tiny_vision, vision_examples

LAYOUTS = ("tree", "padded")
OUTPUTS = ("entropy", "top1", "mean_logits")


def tower(model):
    """The module that sees pixels."""
    return next(m for n, m in model.named_modules() if n.endswith(("vision_tower", "visual")))


def gradients(model, batch, scorer):
    model.zero_grad()
    weights = torch.arange(1.0, batch.num_completions + 1)[batch.completion_index]
    (scorer(model, batch) * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", VISION)
def test_every_layout_scores_as_alone(family, attention):
    """INV-16: rows with one image, several, and none, in one batch."""
    model, examples = tiny_vision(family, attention=attention).eval(), vision_examples(family, completions=3)
    batch = pack(examples)
    assert [image is None for image in batch.images] == [False, False, True, False]
    with torch.no_grad():
        alone = score_alone(model, batch)
        found = {layout: score(model, batch, layout=layout, outputs=OUTPUTS) for layout in LAYOUTS}
    for scores in found.values():
        torch.testing.assert_close(scores.token_logps, alone, atol=1e-5, rtol=0)
    for name in OUTPUTS:
        torch.testing.assert_close(getattr(found["tree"], name), getattr(found["padded"], name), atol=1e-5, rtol=0)
    assert choose_layout(model, examples).layout == "tree"


@pytest.mark.parametrize("family", VISION)
def test_the_vision_tower_keeps_its_attention_and_runs_once_per_prompt(family):
    model, batch = tiny_vision(family).eval(), pack(vision_examples(family, completions=3))
    seen = []
    handle = tower(model).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0] if args else kwargs["pixel_values"]).shape[0]), with_kwargs=True
    )
    with torch.no_grad():
        score(model, batch, layout="tree")
        score(model, batch, layout="padded")
    handle.remove()
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert model.config.text_config._attn_implementation == "tether_tree_sdpa"
    assert len(seen) == 2
    assert seen[1] == 3 * seen[0], "the padded layout repeats the images of each prompt"
    assert seen[0] == sum(len(image.tensors["pixel_values"]) for image in batch.images if image is not None)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", VISION)
def test_gradients_agree(family, adapter, checkpointing):
    """INV-16, 19, 21: to 1e-4 relative; they reach the vision tower."""
    model, batch = tiny_vision(family), pack(vision_examples(family))
    if adapter:
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    model.train()
    expected = gradients(model, batch, score_alone)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    found = gradients(model, batch, lambda m, b: score(m, b).token_logps)
    assert found.keys() == expected.keys()
    total = torch.stack([g.norm() for g in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-4 * total, name
    reached = [name for name, g in expected.items() if ("vision_tower" in name or "visual" in name) and g.abs().max()]
    assert reached


def _exchanged(examples):
    """Two prompts with one image each, each with the other's."""
    first, other = (replace(e, images=None) for e in (examples[0], examples[3]))
    tensors = [dict(examples[i].images.tensors) for i in (3, 0)]
    return [
        replace(one, images=replace(examples[i].images, tensors=pixels))
        for one, i, pixels in zip((first, other), (0, 3), tensors, strict=True)
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_image_of_another_row_changes_the_scores_and_the_keys(layout):
    """Negative control: images are really seen, each by its own row."""
    model, examples = tiny_vision("llava").eval(), vision_examples("llava")
    right, wrong = pack([examples[0], examples[3]]), pack(_exchanged(examples))
    assert torch.equal(right.input_ids, wrong.input_ids)
    with torch.no_grad():
        difference = score(model, right, layout=layout).token_logps - score(model, wrong, layout=layout).token_logps
    assert difference.abs().max() > 1e-2
    assert not set(right.keys) & set(wrong.keys), "a store must not take one for the other"
    assert vision_examples("llava")[0].keys == examples[0].keys, "and knows the same image again"


def _images_in_another_order(original):
    def joined(images, types):
        return original(list(reversed(images)), types)

    return joined


@pytest.mark.parametrize("family", VISION)
def test_images_that_reach_another_row_are_caught(family, monkeypatch):
    """Negative control: the oracle sees images in a wrong order; so does the proof."""
    model, examples = tiny_vision(family).eval(), vision_examples(family)
    examples = [examples[0], replace(examples[0], images=other_image(examples[0].images))]
    with torch.no_grad():
        right = score(model, pack(examples)).token_logps
        monkeypatch.setattr(vision, "joined_images", _images_in_another_order(vision.joined_images))
        wrong = score(model, pack(examples)).token_logps
    assert (right - wrong).abs().max() > 1e-2
    with pytest.raises(ScoringError, match=r"tree layout.* refused"):
        choose_layout(model, examples)


def other_image(images: ImageInputs) -> ImageInputs:
    pixels = images.tensors["pixel_values"]
    return replace(images, tensors={**images.tensors, "pixel_values": -pixels})


def test_positions_that_ignore_the_image_are_caught(monkeypatch):
    """Negative control for Qwen2-VL's positions of time, height and width."""
    model, examples = tiny_vision("qwen2_vl").eval(), vision_examples("qwen2_vl")
    batch = pack(examples)
    positions = vision._packed_positions(model, batch)
    assert positions.shape == (3, 1, batch.forest.length)
    assert not torch.equal(positions[0], positions[2])
    monkeypatch.setattr(vision, "image_positions", lambda _: None)
    with torch.no_grad():
        difference = score(model, batch).token_logps - score_alone(model, batch)
    assert difference.abs().max() > 1e-3
    choice = choose_layout(model, examples)  # padded rows leave positions to the model
    assert choice.layout == "padded"
    assert "tree layout" in choice.line.partition("refused")[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", VISION)
def test_a_batch_without_images_is_scored_as_text(family, layout):
    model, examples = tiny_vision(family).eval(), [vision_examples(family)[2]]
    batch = pack(examples)
    assert batch.images == ()
    with torch.no_grad():
        torch.testing.assert_close(
            score(model, batch, layout=layout).token_logps, score_alone(model, batch), atol=1e-5, rtol=0
        )


def test_images_that_cannot_be_joined_are_refused_with_advice():
    examples = vision_examples("llava")
    pixels = examples[3].images.tensors["pixel_values"][:, :, :8]
    odd = replace(examples[3], images=replace(examples[3].images, tensors={"pixel_values": pixels}))
    with pytest.raises(ScoringError, match="per_device_train_batch_size"):
        score(tiny_vision("llava"), pack([examples[0], odd]))


def test_a_batch_moves_with_its_images():
    batch = pack(vision_examples("qwen2_vl")).to("meta")
    devices = {t.device.type for image in batch.images if image is not None for t in image.tensors.values()}
    assert devices == {"meta"}


def test_prompts_share_a_trunk_only_with_the_same_images():
    """Same ids, other pixels: two trees. Same ids, same pixels: one, whose images go through the tower once."""
    model, first = tiny_vision("llava").eval(), vision_examples("llava")[0]
    again = replace(first, completion_ids=(torch.tensor([9, 8]), torch.tensor([7])))
    other = replace(again, images=other_image(first.images))
    together, apart = pack([first, again]), pack([first, other])
    assert [len(batch.forest.trees) for batch in (together, apart)] == [1, 2]
    assert [len(batch.images) for batch in (together, apart)] == [1, 2]
    with torch.no_grad():
        for batch in (together, apart):
            torch.testing.assert_close(score(model, batch).token_logps, score_alone(model, batch), atol=1e-5, rtol=0)
