"""Rows with images in splits, in the audit and in other tools' formats: the images are a part of the prompt, and no
pixel is read where none is needed."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import PIL.Image
import PIL.ImageOps
import pytest
from datasets import Dataset, Features, Image, Sequence, Value

from data.samples import assistant, pair, user
from tether.data import load_rows, preferences, prepare, read_preferences, split_rows
from tether.data.audit.audit import check
from tether.data.images.sizes import check_sizes, sized, use_sizes
from tether.errors import ConfigError, DataError
from tether.models import load_processing
from tether.training.setup.data import RunData
from tiny import tiny_model, tiny_tokenizer
from tiny_vision import picture, tiny_processor, tiny_vision


def row(image: Any, text: str = "what is it", good: str = "a film", bad: str = "it", **more: Any) -> dict[str, Any]:
    content = [{"type": "image"}, {"type": "text", "text": text}]
    prompt = [{"role": "user", "content": content}]
    return {"images": [image], "prompt": prompt, "chosen": [assistant(good)], "rejected": [assistant(bad)], **more}


@pytest.fixture
def no_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: Any, **__: Any) -> None:
        pytest.fail("pixels were read")

    monkeypatch.setattr(Image, "decode_example", decode)


def files(folder: Any, count: int) -> list[str]:
    for number in range(count):
        picture(number).save(folder / f"{number}.png")
    return [str(folder / f"{number}.png") for number in range(count)]


# -- splits ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_pixels")
@pytest.mark.parametrize("by", ["prompt", "row"])
@pytest.mark.parametrize("stored", ["paths", "in memory", "decoded when read"])
def test_a_split_of_rows_that_differ_in_their_images_alone(stored: str, by: str, tmp_path: Any) -> None:
    """One question about 40 images is 40 prompts; the rows of an image stay together, and where does not move."""
    images = files(tmp_path, 40) if stored == "paths" else [picture(number) for number in range(40)]
    data: Any = [row(images[n // 2], good=f"answer {n % 2}") for n in range(80)]
    if stored == "decoded when read":
        data = Dataset.from_list(load_rows(data).to_list()).cast_column("images", Sequence(Image()))
    rows = load_rows(data)
    train, held = split_rows(rows, {"split": 0.25, "by": by})
    assert 4 <= len(held) <= 40
    assert len(train) + len(held) == 80

    def keys(part: Dataset) -> list[str]:
        return [
            json.dumps(one, default=str)
            for one in part.select_columns(["images"]).with_format("arrow")[:]["images"].to_pylist()
        ]

    if by == "prompt":
        assert not set(keys(train)) & set(keys(held))
    shuffled = rows.shuffle(seed=3)
    assert sorted(keys(split_rows(shuffled, {"split": 0.25, "by": by})[1])) == sorted(keys(held))


def test_without_the_images_they_would_be_one_prompt() -> None:
    """Negative control: the same rows of text cannot be split by prompt."""
    rows = load_rows(
        [{"prompt": [user("what")], "chosen": [assistant(f"{n}")], "rejected": [assistant("x")]} for n in range(9)]
    )
    with pytest.raises(DataError, match="leaves one side empty"):
        split_rows(rows, {"split": 0.5})


def test_the_keys_of_rows_of_text_are_those_of_before() -> None:
    """Rows set aside yesterday stay aside: a column of no images changes nothing."""
    plain = [pair(f"{n}?", f" {n}") for n in range(50)]
    held = split_rows(load_rows(plain), {"split": 0.3})[1]["prompt"][:]
    with_column = load_rows([{**one, "images": []} for one in plain])
    assert split_rows(with_column, {"split": 0.3})[1]["prompt"][:] == held


def test_a_fault_in_the_parts_is_named() -> None:
    rows = load_rows([row(picture(0)), {**row(picture(1)), "images": [picture(1), picture(2)]}])
    with pytest.raises(DataError, match="train: row 2: `prompt` has 1 image parts for 2 images"):
        split_rows(rows, {"split": 1})


# -- audit -------------------------------------------------------------------------------------------------------------


def found(rows: list[dict], **options: Any) -> dict[str, tuple[int, ...]]:
    return {name: one.rows for name, one in check(load_rows(rows), **options).findings.items() if one.count}


@pytest.mark.usefixtures("no_pixels")
def test_images_are_a_part_of_the_prompt(tmp_path: Any) -> None:
    """INV-35: the same words about another image are neither a duplicate nor a contradiction."""
    a, b, c, d = files(tmp_path, 4)
    long = " ".join(f"word{n}" for n in range(60))
    rows = [row(a), row(b), row(a), row(a, good="it", bad="a film"), row(c, long), row(d, long), row(c, f"{long} more")]
    seen = found(rows)
    assert seen["duplicates"] == (3,)
    assert seen["contradictions"] == (4,)
    assert seen["near_duplicates"] == (7,)
    held = found([row(a), row(b)], evaluation=[load_rows([row(b), row(c)])])
    assert held["in_evaluation"] == held["prompts_in_evaluation"] == (2,)
    labelled = [
        {"images": [i], "prompt": [user("w")], "completion": [assistant("x")], "label": label}
        for i, label in ((a, True), (b, False), (a, False))
    ]
    assert found(labelled, kind="unpaired")["contradictions"] == (3,)


@pytest.mark.usefixtures("no_pixels")
def test_what_is_wrong_with_images_is_said_with_the_row(tmp_path: Any) -> None:
    a, b = files(tmp_path, 2)
    two = {**row(a), "images": [a, b]}
    chosen = {
        **row(a),
        "chosen": [{"role": "assistant", "content": [{"type": "image"}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "x"}]}],
    }
    result = check(load_rows([row(a), two, row("nowhere.png")]))
    assert result.faults == (
        "row 2: `prompt` has 1 image parts for 2 images",
        "row 3: its image `nowhere.png` is not there",
    )
    assert check(load_rows([chosen])).faults == (
        "row 1: `chosen` has an image part; images are read from the prompt only",
    )
    sampled = check(load_rows([row(a)] * 9 + [row("nowhere.png")] * 9), sample=6)
    assert sampled.faults[0].startswith("row 10:")


def test_a_tokenizer_alone_cannot_stand_for_a_processor(tmp_path: Any) -> None:
    with pytest.raises(
        DataError, match=r"row 1: the column `images` holds images, and a tokenizer alone .* does not read"
    ):
        check(load_rows([row(picture(0))]), tokenizer=tiny_tokenizer())


def test_lengths_count_the_tokens_of_images_and_what_a_limit_would_cut() -> None:
    """Against preparation itself, whose rule the audit uses."""
    processor = tiny_processor("qwen2_vl")
    rows = [row(picture(n, 16 + 8 * n, 16), "what" + " really" * n) for n in range(4)]
    result = check(load_rows(rows), tokenizer=processor, max_length=34, truncation_mode="keep_end")
    whole = prepare(rows, processor, max_length=None)
    tokens = [len(one["prompt_ids"]) for one in whole.dataset.with_format(None)]
    assert result.lengths is not None
    assert result.lengths.quantiles["prompt"]["max"] == max(tokens)
    cut = prepare(rows, processor, max_length=34, truncation_mode="keep_end").report
    assert cut.dropped["image_cut"] == result.findings["image_cut"].count > 0
    wrong = check(
        load_rows([*rows, {**row(None), "images": [{"bytes": b"no image", "path": None}]}]), tokenizer=processor
    )
    assert [fault[:35] for fault in wrong.faults] == ["row 5: its images cannot be read (c"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_looks_at_its_rows_in_one_process(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The audit is written by the first process alone, so it is made there alone; images are read by preparation."""
    looked: list[str] = []
    monkeypatch.setattr("tether.training.setup.data.check", lambda *a, **k: looked.append(k["name"]) or check(*a, **k))
    args: Any = SimpleNamespace(
        kind="pair",
        dataset_cache=None,
        max_length=None,
        turns="all",
        truncation_mode="keep_start",
        prompt_boundary="split",
        dataset_num_proc=None,
        deduplicate=False,
        default_system=None,
        chat_template_kwargs=None,
        process_index=rank,
        output_dir="unused",
    )
    data = RunData(tiny_processor("llava"), args)
    data.prepare("train", [row(picture(0)), row(picture(1)), row(picture(0))])
    assert looked == (["train"] if rank == 0 else [])
    assert ("audit" in data.reports["train"]) == (rank == 0)
    if rank == 0:
        assert data.reports["train"]["audit"]["duplicates"] == pytest.approx(1 / 3)


# -- sizes -------------------------------------------------------------------------------------------------------------


def test_images_are_brought_to_a_size_that_is_saved_with_the_processor(tmp_path: Any) -> None:
    """Qwen2-VL's processor gives an image a token for 8 x 8 pixels here, so that the size shows in the tokens."""
    processor: Any = tiny_processor("qwen2_vl")
    rows = [row(picture(0, width=32, height=16))]

    def tokens() -> int:
        [example] = prepare(rows, processor, max_length=None, name="train").dataset
        inputs = example["image_inputs"]
        return int(inputs.token_types.sum())

    assert tokens() == 8
    counts = {}
    for sizes in ({"max_pixels": 128}, {"min_pixels": 1024}, {"max_pixels": 512}, {"size": 24}, {"size": [8, 16]}):
        use_sizes(processor, sizes)
        counts[json.dumps(sizes)] = tokens()
    assert list(counts.values()) == [2, 10, 8, 9, 2]
    processor.image_processor.save_pretrained(tmp_path)
    again = type(processor.image_processor).from_pretrained(tmp_path)
    assert sized(picture(0, width=32, height=16), SimpleNamespace(image_processor=again)).size == (8, 16)
    padded = sized(picture(0, width=32, height=16), SimpleNamespace(image_processor=SimpleNamespace()))
    assert padded.size == (32, 16)


def test_a_square_has_black_beside_the_image() -> None:
    """As Axolotl pads it; and LLaMA-Factory's bound on pixels keeps the proportions."""
    processor: Any = tiny_processor("qwen2_vl")
    use_sizes(processor, {"size": 16, "resample": "bilinear"})
    found = sized(PIL.Image.new("RGB", (32, 16), (255, 255, 255)), processor)
    assert [found.getpixel((8, place)) for place in (0, 8, 15)] == [(0, 0, 0), (255, 255, 255), (0, 0, 0)]
    use_sizes(processor, {"size": 24, "resample": "lanczos"})
    seen = picture(3, width=30, height=17)
    padded = PIL.ImageOps.pad(seen, (24, 24), method=PIL.Image.Resampling.LANCZOS, color=(0, 0, 0))
    assert sized(seen, processor).tobytes() == padded.tobytes()
    use_sizes(processor, {"max_pixels": 200})
    assert sized(picture(0, width=40, height=10), processor).size == (28, 7)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"max_pixel": 3}, "has max_pixel: 3; allowed is one of max_pixels, min_pixels, size, resample as a key"),
        ({"max_pixels": 0}, "has max_pixels: 0; allowed is a whole number from 1"),
        ({"max_pixels": [3, 3]}, r"has max_pixels: \[3, 3\]; allowed is a whole number"),
        ({"size": 8, "resample": "cubic"}, "has resample: 'cubic'; allowed is nearest, lanczos"),
        ({"size": 8, "min_pixels": 9}, "has a size, which says more than max_pixels"),
        ({"resample": "bicubic"}, "has a way to resample, and nothing that changes a size"),
    ],
)
def test_sizes_that_mean_nothing_are_refused(sizes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_sizes(sizes)


def test_sizes_and_keywords_are_of_what_reads_images(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=r"is given, and .* reads no images"):
        use_sizes(tiny_tokenizer(), {"max_pixels": 3})
    tiny_vision("llava").save_pretrained(tmp_path / "sees")
    tiny_processor("llava").save_pretrained(tmp_path / "sees")
    loaded: Any = load_processing(tmp_path / "sees", vision_feature_select_strategy="full")
    assert (loaded.vision_feature_select_strategy, loaded.image_token) == ("full", "<image>")
    tiny_model().save_pretrained(tmp_path / "text")
    with pytest.raises(ConfigError, match=r"Keywords of a processor were given for .*: the model sees no images"):
        load_processing(tmp_path / "text", vision_feature_select_strategy="full")


# -- formats -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given"),
    [
        (
            "sharegpt",
            {
                "conversations": [{"from": "human", "value": "<image>what is <image>it"}],
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {"from": "gpt", "value": "b"},
            },
        ),
        ("alpaca", {"instruction": "<image>what is <image>it", "chosen": "a", "rejected": "b"}),
        ("chatml.intel", {"question": "<image>what is <image>it", "chosen": "a", "rejected": "b"}),
    ],
)
def test_images_of_other_tools_rows_are_kept_in_their_places(name: str, given: dict, tmp_path: Any) -> None:
    """INV-33: LLaMA-Factory's `images` and `<image>`; other rows of the file need not have any."""
    images = files(tmp_path, 2)
    text = {key: json.loads(json.dumps(value).replace("<image>", "")) for key, value in given.items()}
    rows = load_rows({"path": [{**given, "images": images}, {**text, "images": []}], "format": name})
    content = [
        {"type": "image"},
        {"type": "text", "text": "what is "},
        {"type": "image"},
        {"type": "text", "text": "it"},
    ]
    expected = {
        "images": images,
        "prompt": [{"role": "user", "content": content}],
        "chosen": [assistant("a")],
        "rejected": [assistant("b")],
    }
    processor = tiny_processor("qwen2_vl")
    [first, second] = prepare(rows, processor, max_length=None).dataset
    [own] = prepare([expected], processor, max_length=None).dataset
    assert first["prompt_ids"] == own["prompt_ids"]
    assert second["image_inputs"] is None
    assert not check(rows).faults


def test_images_of_whole_conversations_stand_before_the_first_answer() -> None:
    """As `prompt` and `completion` have them, with all turns of the assistant or the last one scored."""
    asked, said, more = row(picture(0))["prompt"], assistant("a film"), [user("sure"), assistant("yes")]
    processor = tiny_processor("qwen2_vl")
    whole = [
        {"images": [picture(0)], "messages": [*asked, said, *more]},
        {"images": [], "messages": [user("hi"), said, *more]},
        {"images": [picture(1)], "messages": [user("what"), said, *more]},
    ]
    parted = [
        {"images": one["images"], "prompt": one["messages"][:1], "completion": one["messages"][1:]} for one in whole
    ]
    for turns in ("assistant", "last"):
        found, own = (
            prepare(rows, processor, max_length=None, kind="completion", turns=turns).dataset
            for rows in (whole, parted)
        )
        assert found.with_format(None)[:] == own.with_format(None)[:]
        assert [one["image_inputs"] is None for one in found] == [False, True, False]
    with pytest.raises(DataError, match=r"every token of them is to be trained on.*train: \{turns: assistant\}"):
        prepare(whole, processor, max_length=None, kind="completion")
    late = [{"images": [picture(0)], "messages": [user("hi"), said, *asked, said]}]
    with pytest.raises(DataError, match="row 1: `messages` has an image part behind the first answer"):
        prepare(late, processor, max_length=None, kind="completion", turns="assistant")


@pytest.mark.usefixtures("no_pixels")
def test_images_in_a_table_are_converted_as_files(tmp_path: Any) -> None:
    [path] = files(tmp_path, 1)
    features = Features(
        {
            "question": Value("string"),
            "chosen": Value("string"),
            "rejected": Value("string"),
            "images": Sequence(Image()),
        }
    )
    table = Dataset.from_list(
        [{"question": "<image>?", "chosen": "a", "rejected": "b", "images": [path]}], features=features
    )
    rows = load_rows({"path": table, "format": "chatml.intel"})
    assert check(rows).findings["broken"].count == 0


def test_what_a_format_does_not_read_is_listed() -> None:
    """INV-33: also a column whose name means something elsewhere."""
    given = {"question": "Why?", "chosen": "So.", "rejected": "No.", "source": "web", "messages": "note", "empty": None}
    rows = load_rows({"path": [given], "format": "chatml.intel"})
    assert read_preferences(rows).unused_columns == ("source", "messages (of the source)")
    [record] = preferences(rows, read_preferences(rows))
    assert record.prompt == [user("Why?")]
    whole = {"prompt": [user("Why?")], "chosen": [assistant("So.")], "rejected": [assistant("No.")], "source": "web"}
    rows = load_rows({"path": [whole], "format": "openrlhf"})
    assert read_preferences(rows).unused_columns == ("source",)


def test_tools_beside_text_are_refused_and_not_dropped() -> None:
    given = {"prompt": "Why?", "chosen": "So.", "rejected": "No.", "tools": [{"name": "f"}]}
    rows = load_rows({"path": [given], "format": "user_defined"})
    with pytest.raises(DataError, match="row 1: `tools` is given, but the row is text"):
        read_preferences(rows)


@pytest.mark.parametrize("column", ["videos", "audio"])
def test_what_no_model_here_reads_is_refused(column: str) -> None:
    rows = load_rows([{**pair(), column: ["clip"]}])
    with pytest.raises(DataError, match=f"row 1: the column `{column}` holds values"):
        read_preferences(rows)
