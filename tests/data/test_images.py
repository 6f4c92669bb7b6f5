"""Rows with images: what is read, what is refused, and what a processor gives for them by itself."""

from __future__ import annotations

import base64
import io
import json

import pyarrow as pa
import pytest
import torch
from datasets import Dataset

from support.image_rows import row
from tether.data import example_from_row, prepare, prepare_cached
from tether.data.images.lifted import lifted
from tether.data.sources.stream import RowStream
from tether.errors import DataError
from tiny_vision import VISION, picture, tiny_processor


def said(part):
    """A prompt of one image part."""
    return {"images": [], "prompt": [{"role": "user", "content": [{"type": "image", **part}]}]}


def prepared(rows, family="llava", **options):
    return prepare(rows, tiny_processor(family), **{"max_length": None, **options})


@pytest.mark.parametrize("family", VISION)
def test_a_row_is_what_the_processor_makes_of_the_conversation(family):
    """INV-29, 33: ids, pixels and token types, against one call of the processor on the rendered prompt."""
    processor, rows = tiny_processor(family), [row(2), row(1, text="and this"), row(0)]
    for given, found in zip(rows, prepared(rows, family).dataset, strict=True):
        text = processor.apply_chat_template(given["prompt"], tokenize=False, add_generation_prompt=True)
        made = processor(text=[text], images=[given["images"]] if given["images"] else None, return_tensors="pt")
        example = example_from_row(found)
        assert example.prompt_ids.tolist() == made["input_ids"][0].tolist()
        assert processor.tokenizer.decode(example.completion_ids[0]) == "a film<|im_end|>"
        if not given["images"]:
            assert example.images is None
            continue
        assert torch.equal(example.images.tensors["pixel_values"], made["pixel_values"])
        assert example.images.tensors.keys() == made.keys() - {"input_ids", "attention_mask", "mm_token_type_ids"}
        assert torch.equal(example.images.token_types, (made["input_ids"][0] == processor.image_token_id).long())
        assert example.images.type_names == (("mm_token_type_ids",) if family == "qwen2_vl" else ())


def test_images_without_a_place_stand_before_the_first_user_message():
    """As in TRL's prepare_multimodal_messages."""
    placed = row(2)
    placed["prompt"][0]["content"] = [{"type": "image"}] * 2 + [{"type": "text", "text": "what is it"}]
    assert prepared([row(2, parts=False)]).dataset[0]["prompt_ids"] == prepared([placed]).dataset[0]["prompt_ids"]


def test_sources_of_images_give_the_same(tmp_path):
    """In memory, in a data set, as files that a table names, and in a column `image`."""
    picture(0).save(tmp_path / "0.png")
    one = {**row(1, parts=False), "images": [picture(0)]}
    named = {**one, "images": [str(tmp_path / "0.png")]}
    single = {name: value for name, value in one.items() if name != "images"} | {"image": picture(0)}
    expected = example_from_row(prepared([one]).dataset[0]).keys
    for rows in (Dataset.from_list([one]), [named], Dataset.from_list([named]), [single], Dataset.from_list([single])):
        assert example_from_row(prepared(rows).dataset[0]).keys == expected


def held(part, **more):
    """The row of one image whose part holds it, without a column of images."""
    given = row(1, **more)
    del given["images"]
    given["prompt"][0]["content"][1] = part
    return given


def test_a_part_may_hold_its_image(tmp_path):
    """As transformers' templates, OpenAI and LLaMA-Factory's v1 rows write it; the same example as by the column."""
    file, buffer = tmp_path / "an image.png", io.BytesIO()
    picture(0).save(file)
    picture(0).save(buffer, format="PNG")
    text = base64.b64encode(buffer.getvalue()).decode()
    parts = [
        {"type": "image", "image": picture(0)},
        {"type": "image", "image": str(file)},
        {"type": "image", "path": str(file)},
        {"type": "image", "url": file.as_uri()},
        {"type": "image", "base64": text},
        {"type": "image", "image": {"bytes": buffer.getvalue(), "path": None}},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}"}},
        {"type": "image_url", "value": str(file)},
    ]
    expected = example_from_row(prepared([{**row(1), "images": [picture(0)]}]).dataset[0]).keys
    for part in parts:
        assert example_from_row(prepared([held(part)]).dataset[0]).keys == expected, part
    stored = [held(part) for part in parts[1:4]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in stored))
    streamed = Dataset(
        pa.concat_tables([chunk.data.table for chunk in RowStream(str(tmp_path / "rows.jsonl")).chunks()])
    )
    for rows in (Dataset.from_list(stored), str(tmp_path / "rows.jsonl"), streamed):
        assert [example_from_row(one).keys for one in prepared(rows).dataset] == [expected] * 3


def test_parts_with_and_without_their_image_take_turns():
    """A part without one takes the next of the column; both answers of a pair without a prompt show the same one."""
    mixed = held({"type": "image", "image": picture(0)})
    mixed["prompt"][0]["content"].append({"type": "image"})
    mixed["images"] = [picture(1)]
    plain = {**row(1), "images": [picture(0), picture(1)]}
    plain["prompt"][0]["content"].append({"type": "image"})
    assert example_from_row(prepared([mixed]).dataset[0]).keys == example_from_row(prepared([plain]).dataset[0]).keys
    asked = held({"type": "image", "image": picture(0)})
    prompt = asked.pop("prompt")
    both = {name: [*prompt, *asked[name]] for name in ("chosen", "rejected")}
    assert lifted([both], "rows")[0]["images"] == [picture(0)]


def test_the_key_follows_the_image():
    """INV-13: another image is another key; the same one in another row is the same."""
    same, other = row(1), row(1)
    other["images"] = [picture(50)]
    found = prepared([row(1), same, other])
    first, again, third = (example_from_row(one).keys for one in found.dataset)
    assert first == again
    assert not set(first) & set(third)
    assert found.report.duplicates == 1, "rows that differ in their image alone are no duplicates"


def test_a_prompt_of_text_holds_the_image_token_itself():
    text = {"images": [picture(0)], "prompt": "<image> what is it", "chosen": " a film", "rejected": " it"}
    processor = tiny_processor("llava")
    made = processor(text=[text["prompt"]], images=[text["images"]])
    assert prepared([text]).dataset[0]["prompt_ids"] == made["input_ids"][0]


def test_truncation_never_cuts_an_image():
    """INV-32: a row whose prompt would lose a part of an image is dropped and counted; one that loses text is not."""
    long = row(1, text=" really" * 30)
    (whole,) = prepared([long]).dataset
    total = len(whole["prompt_ids"]) + max(map(len, whole["completion_ids"]))
    inside = whole["prompt_ids"].index(tiny_processor("llava").image_token_id) + 5
    before = row(1)
    before["prompt"][0]["content"] = [{"type": "text", "text": " really" * 30}, {"type": "image"}]
    found = prepared([long, before], max_length=total - inside, truncation_mode="keep_end")
    assert found.report.dropped["image_cut"] == 1
    assert found.report.cut_prompts == 1
    (kept,) = found.dataset
    assert kept["source_row"] == 1
    assert example_from_row(kept).images.token_types.sum() == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": [picture(0), picture(1)]}, "row 1: `prompt` has 1 image parts for 2 images"),
        ({"images": []}, "1 image parts for 0 images"),
        (
            {"chosen": [{"role": "assistant", "content": [{"type": "image"}]}]},
            "`chosen` has an image part; images are read from the prompt only",
        ),
        ({"prompt": [{"role": "user", "content": [{"type": "video"}]}]}, "a part of `content` has the type 'video'"),
        ({"images": ["nowhere.png"]}, "row 1: its images cannot be read"),
        (said({"path": "a.png", "url": "b.png"}), "an image part has `path` and `url`; leave one of them out"),
        (said({"path": "a.png", "resized_height": 9}), "an image part has `resized_height`, which is not read"),
        (said({"base64": "no!"}), "`base64` of an image part is not base64"),
        (said({"image": 7}), "`image` of an image part is a number .7.; it must be a file's path, or the image"),
        (said({"url": "https://example.org/a.png"}), "its image is at an address, `https://example.org/a.png`"),
        ({"images": [{"bytes": b"no image", "path": None}]}, "row 1: its images cannot be read"),
    ],
)
def test_what_is_wrong_is_said_with_the_row(changes, message):
    with pytest.raises(DataError, match=message):
        prepared([row(1, **changes)])


def test_a_prompt_of_text_without_the_image_token_is_refused():
    with pytest.raises(DataError, match="0 image tokens '<image>' for 1 images"):
        prepared([{"images": [picture(0)], "prompt": "what", "chosen": " a", "rejected": " b"}])


def test_text_with_the_private_character_is_refused():
    with pytest.raises(DataError, match="stands for images here"):
        prepared([row(1, text="odd \ue000 text")])


def test_several_processes_give_the_same():
    rows = [row(1, text=f"number {i}") for i in range(5)]
    one, two = prepared(rows), prepared(rows, num_proc=2)
    assert one.report.fingerprint == two.report.fingerprint


def test_pixels_change_the_fingerprint_of_a_data_set():
    other = row(1)
    other["images"] = [picture(50)]
    assert prepared([row(1)]).report.fingerprint != prepared([other]).report.fingerprint


def test_rows_with_images_are_prepared_each_time(tmp_path):
    """A file of an image may change under its name; rows of text for the same processor are cached."""
    processor = tiny_processor("llava")
    found = prepare_cached([row(1)], processor, folder=tmp_path, max_length=None)
    assert example_from_row(found.dataset[0]).images is not None
    assert not list(tmp_path.iterdir())
    text = [{name: value for name, value in row(0, parts=False).items() if name != "images"}]
    for _ in range(2):
        again = prepare_cached(text, processor, folder=tmp_path, max_length=None)
        assert again.dataset[0] == prepare(text, processor, max_length=None).dataset[0]
    assert len(list(tmp_path.iterdir())) == 1
