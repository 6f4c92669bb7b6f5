"""A folder in which hub names of models and data sets are tiny local folders, so that files of other tools run as is.

transformers, datasets and Tether take a name that is a folder of the current directory for that folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import LlamaForSequenceClassification

from tiny import tiny_model, tiny_tokenizer
from tiny_vision import picture, tiny_processor, tiny_vision

# Special tokens that the files name, and the real models have.
SPECIAL = (
    "<|eot_id|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|begin_of_text|>",
    "<|end|>",
    "<|user|>",
    "<|eom|>",
    "<start_of_turn>",
    "<end_of_turn>",
)
COUNT = 12
_INSTRUCT = (
    "meta-llama/Meta-Llama-3-8B-Instruct",
    "meta-llama/Llama-3.2-1B-Instruct",
    "Qwen/Qwen3-4B-Instruct-2507",
    "Qwen/Qwen3-8B",
    "Qwen/Qwen2.5-0.5B-Instruct",
    "Qwen/Qwen3-0.6B",
    "mistralai/Mistral-7B-Instruct-v0.2",
    "alignment-handbook/zephyr-7b-sft-full",
    "HuggingFaceTB/SmolLM3-3B-checkpoints",
    "trl-lib/qwen1.5-1.8b-sft",
    "HuggingFaceH4/zephyr-7b-gemma-sft-v0.1",
    "microsoft/Phi-3.5-mini-instruct",
)
_BASE = (
    "meta-llama/Meta-Llama-3-8B",
    "meta-llama/Llama-3.2-1B",
    "mistralai/Mistral-7B-v0.1",
    "Qwen/Qwen2.5-0.5B",
    "mistralai/Mixtral-8x7B-v0.1",
    "ai21labs/AI21-Jamba-Mini-1.6",
    "lmsys/llama-7b",
)
# A model whose head for one label is drawn already, so that two tools begin with the same one.
_CLASSIFIER = ("google/gemma-2-2b",)
# A model that sees images; the processors of Qwen2-VL need a package that is not installed.
_SEES = ("Qwen/Qwen2.5-VL-7B-Instruct", "llava")


def questions() -> list[tuple[str, str, str]]:
    """A question, a good answer and a bad one, of uneven lengths."""
    words = ["good", "bad", "long and winding", "not what I liked", "fine", "dull as ever", "it"]
    return [
        (
            f"Film {n} was" + " really" * (n % 4),
            " and ".join(words[(n + k) % 7] for k in range(1 + n % 3)),
            " or ".join(words[(n + 3 + k) % 7] for k in range(1 + (n + 1) % 4)),
        )
        for n in range(COUNT)
    ]


def said(role: str, content: str) -> dict[str, str]:
    """A message."""
    return {"role": role, "content": content}


def talk(question: str, *answers: str) -> list[dict[str, str]]:
    """A question and its answers as messages."""
    return [said("user", question), *(said("assistant", answer) for answer in answers)]


def sets() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Rows by name of a data set and file in it; all hold the same questions and answers, each laid out in its way."""
    plain = questions()

    def older(messages: list[dict[str, str]]) -> list[dict[str, str]]:
        names = {"user": "human", "assistant": "gpt", "system": "system"}
        return [{"from": names[one["role"]], "value": one["content"]} for one in messages]

    chats = [[*talk(q, bad), *talk("And now?", good)] for q, good, bad in plain]
    return {
        "someone/conversations-dpo": {
            "train": [
                {"conversation": talk(q), "chosen": said("assistant", good), "rejected": said("assistant", bad)}
                for q, good, bad in plain
            ]
        },
        "someone/ultrafeedback-cleaned": {
            "train": [
                {"source": "x", "prompt": q, "chosen": talk(q, good), "chosen-rating": 5.0, "rejected": talk(q, bad)}
                for q, good, bad in plain
            ]
        },
        "someone/ultrafeedback-kto": {
            "train": [
                {"prompt": q, "completion": (good, bad)[n % 2], "label": n % 2 == 0, "system": "Be brief."}
                for n, (q, good, bad) in enumerate(plain)
            ]
        },
        "someone/orca-pairs-rated": {
            "train": [
                {"system": "", "input": q, "chosen": good, "rejected": bad, "rating": [9.0, 4.0]}
                for q, good, bad in plain
            ]
        },
        "someone/orca-dpo-pairs": {
            "train": [{"system": "Be brief.", "question": q, "chosen": good, "rejected": bad} for q, good, bad in plain]
        },
        "someone/alpaca": {
            "train": [
                {"instruction": q, "input": "" if n % 2 else "a film", "output": good, "text": "whole"}
                for n, (q, good, _) in enumerate(plain)
            ]
        },
        "someone/messages": {"train": [{"messages": chat} for chat in chats]},
        "someone/llava-mix": {
            "train": [
                {
                    "images": ["data/seen.png"],
                    "messages": [
                        {
                            "role": "user",
                            "content": [{"type": "text", "text": f"{q} "}, {"type": "image", "text": None}],
                        },
                        {"role": "assistant", "content": [{"type": "text", "text": good}]},
                        {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
                        {"role": "assistant", "content": [{"type": "text", "text": bad}]},
                    ],
                }
                for q, good, bad in plain
            ]
        },
        "someone/conversations-100": {
            "train": [{"conversations": older(chat), "source": "x", "score": 1.5} for chat in chats]
        },
        "someone/arithmetic": {"train": [{"question": f"{n} + {n}?", "answer": f"so #### {2 * n}"} for n in range(20)]},
        "someone/questions": {"train": [{"prompt": talk(q), "solution": good} for q, good, _ in plain]},
        "someone/ultrafeedback_binarized": {
            part: [
                {"chosen": talk(q, good), "rejected": talk(q, bad), "score_chosen": 8.0, "score_rejected": 3.0}
                for q, good, bad in plain[rows]
            ]
            for part, rows in (("train", slice(COUNT)), ("test", slice(4)))
        },
        "someone/orca-trl": {
            "train": [{"chosen": talk(q + "?", good), "rejected": talk(q + "?", bad)} for q, good, bad in plain]
        },
        "someone/kto-mix": {
            part: [
                {"prompt": talk(q), "completion": [said("assistant", (good, bad)[n % 2])], "label": n % 2 == 0}
                for n, (q, good, bad) in enumerate(plain[rows])
            ]
            for part, rows in (("train", slice(COUNT)), ("test", slice(4)))
        },
        "someone/Capybara": {
            part: [{"source": "x", "messages": chat, "num_turns": 2} for chat in chats[rows]]
            for part, rows in (("train", slice(COUNT)), ("test", slice(4)))
        },
        "someone/reviews": {
            part: [{"text": f"{q} {good}.", "label": n % 2} for n, (q, good, _) in enumerate(plain[rows])]
            for part, rows in (("train", slice(COUNT)), ("test", slice(4)))
        },
        "someone/hh-rlhf": {
            part: [
                {name: f"\n\nHuman: {q}\n\nAssistant: {one}" for name, one in (("chosen", good), ("rejected", bad))}
                for q, good, bad in plain[rows]
            ]
            for part, rows in (("train", slice(COUNT)), ("test", slice(4)))
        },
        "data": {
            part: [
                {"context": "Be brief.", "question": q, "better": good, "worse": bad} for q, good, bad in plain[rows]
            ]
            for part, rows in (("own", slice(COUNT)), ("own_test", slice(4)))
        },
        **{"LLaMA-Factory": _factory_sets(plain, chats, older)},
    }


def parts(question: str, answer: str, *images: dict[str, str]) -> list[dict[str, Any]]:
    """A conversation as LLaMA-Factory's v1 rows have it."""
    asked = [{"type": "text", "value": f"{question} "}, *images]
    return [
        {"role": "user", "content": asked, "loss_weight": 0.0},
        {"role": "assistant", "content": [{"type": "text", "value": answer}], "loss_weight": 1.0},
    ]


def _factory_sets(plain: Any, chats: Any, older: Any) -> dict[str, list[dict[str, Any]]]:
    """Rows of `data/` of LLaMA-Factory, by file."""
    return {
        "dpo_en_demo": [
            {
                "conversations": [{"from": "human", "value": q}],
                "chosen": {"from": "gpt", "value": good},
                "rejected": {"from": "gpt", "value": bad},
            }
            for q, good, bad in plain
        ],
        "kto_en_demo": [
            {
                "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": (good, bad)[n % 2]}],
                "label": n % 2 == 0,
            }
            for n, (q, good, bad) in enumerate(plain)
        ],
        "identity": [{"instruction": "hi", "input": "", "output": "Hello! I am {{name}}."}],
        "alpaca_en_demo": [
            {"instruction": q, "input": "" if n % 2 else "a film", "output": good}
            for n, (q, good, _) in enumerate(plain)
        ],
        "chats": [{"conversations": older(chat)} for chat in chats],
        "mllm_demo": [
            {
                "messages": [said("user", f"<image>{q}"), said("assistant", good), *talk("And now?", bad)],
                "images": ["data/seen.png"],
            }
            for q, good, bad in plain
        ],
        "v1_pairs": [
            {f"{name}_messages": parts(q, one) for name, one in (("chosen", good), ("rejected", bad))}
            for q, good, bad in plain
        ],
        "v1_seen": [
            {"messages": parts(q, good, {"type": "image_url", "value": "data/seen.png"})} for q, good, _ in plain
        ],
        "glaive_toolcall_en_demo": [
            {
                "conversations": [
                    {"from": "human", "value": q},
                    {"from": "function_call", "value": json.dumps({"name": "rate", "arguments": {"film": n}})},
                    {"from": "observation", "value": json.dumps({"stars": n % 5})},
                    {"from": "gpt", "value": good},
                ],
                "tools": json.dumps([{"name": "rate", "description": "Stars", "parameters": {"type": "object"}}]),
            }
            for n, (q, good, _) in enumerate(plain)
        ],
        "rlhf_v": [
            {
                "conversations": [{"from": "human", "value": f"<image>{q}"}],
                "chosen": {"from": "gpt", "value": good},
                "rejected": {"from": "gpt", "value": bad},
                "images": ["data/seen.png"],
            }
            for q, good, bad in plain
        ],
    }


# LLaMA-Factory's own list of its demonstration data.
DATASET_INFO: dict[str, Any] = {
    "identity": {"file_name": "identity.json"},
    "alpaca_en_demo": {"file_name": "alpaca_en_demo.json"},
    "chats": {"file_name": "chats.json", "formatting": "sharegpt"},
    "mllm_demo": {
        "file_name": "mllm_demo.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "images": "images"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    },
    "glaive_toolcall_en_demo": {
        "file_name": "glaive_toolcall_en_demo.json",
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "tools": "tools"},
    },
    "dpo_en_demo": {
        "file_name": "dpo_en_demo.json",
        "ranking": True,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
    },
    "rlhf_v": {
        "file_name": "rlhf_v.json",
        "ranking": True,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected", "images": "images"},
    },
    "kto_en_demo": {
        "file_name": "kto_en_demo.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "kto_tag": "label"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    },
}
# Reward functions and a transform of rows, as they lie beside a file.
FUNCTIONS = '''\
"""Rewards of completions, and what makes a prompt of a row."""


def brief(completions, **kwargs):
    return [-float(len(str(one))) for one in completions]


def format_reward(completions, **kwargs):
    return [float("#" in str(one)) for one in completions]


def correctness_reward(prompts, completions, answer, **kwargs):
    assert len(prompts) == len(completions) == len(answer)
    return [float(right in str(one)) for one, right in zip(completions, answer)]


def question_transform(cfg, *args, **kwargs):
    def transform_fn(example, tokenizer=None):
        label = example["answer"].split("####")[-1].strip()
        return {"prompt": [{"role": "user", "content": example["question"]}], "answer": label}

    return transform_fn, {"remove_columns": ["question"]}
'''


def write_hub(folder: Path) -> None:
    """Models, data sets, and what else the files name, into a folder."""
    tokenizer = tiny_tokenizer()
    # Nothing after the end of a turn, which TRL would take into a completion.
    tokenizer.chat_template = str(tokenizer.chat_template).replace("<|im_end|>\n", "<|im_end|>")
    tokenizer.bos_token = None  # TRL's ORPO and CPO would write it before a prompt that a template has written
    tokenizer.add_tokens(list(SPECIAL), special_tokens=True)
    sizes = {
        "vocab_size": len(tokenizer),
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "max_position_embeddings": 32768,
    }
    model = tiny_model(**sizes)
    base = tiny_tokenizer(chat=False)
    base.bos_token = None
    base.add_tokens(list(SPECIAL), special_tokens=True)
    for names, written in ((_INSTRUCT, tokenizer), (_BASE, base)):
        first = folder / names[0]
        model.save_pretrained(first)
        written.save_pretrained(first)
        for name in names[1:]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(first, target_is_directory=True)
    for name in _CLASSIFIER:
        classifier = LlamaForSequenceClassification(
            model.config.__class__(**{**model.config.to_dict(), "num_labels": 1})
        )
        classifier.save_pretrained(folder / name)
        base.save_pretrained(folder / name)
    name, family = _SEES
    tiny_vision(family).save_pretrained(folder / name)
    tiny_processor(family).save_pretrained(folder / name)
    (folder / "data").mkdir(exist_ok=True)
    picture(0, width=40, height=20).save(folder / "data" / "seen.png")
    for name, parts in sets().items():
        for part, rows in parts.items():
            ending = "json" if name == "LLaMA-Factory" else "jsonl"
            path = folder / ("data" if ending == "json" else name) / f"{part}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = json.dumps(rows) if ending == "json" else "".join(json.dumps(row) + "\n" for row in rows)
            path.write_text(lines, encoding="utf-8")
    (folder / "data" / "dataset_info.json").write_text(json.dumps(DATASET_INFO), encoding="utf-8")
    for name in ("v1_pairs", "v1_seen"):
        lines = f"{name}: {{path: data/{name}.json, source: local}}\n"
        (folder / "data" / f"{name}.yaml").write_text(lines, encoding="utf-8")
    (folder / "rwd.py").write_text(FUNCTIONS, encoding="utf-8")
    for name in ("deepspeed_configs/zero2.json", "examples/deepspeed/ds_z3_config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"zero_optimization": {"stage": 2}}), encoding="utf-8")
