"""A row in each format of another tool and what it becomes, and a row in each shape that needs no format."""

from __future__ import annotations

from typing import Any

from data.samples import assistant, pair, user

SYSTEM = {"role": "system", "content": "Be kind."}
ASKED, GOOD, BAD = [user("Why?")], [assistant("So.")], [assistant("No.")]
TALK = [user("Hi"), assistant("Hello"), user("Why?")]


def ends(content: str) -> list[dict]:
    return [*ASKED, assistant(content)]


def said(speaker: str, value: str) -> dict[str, str]:
    return {"from": speaker, "value": value}


SHARED = [said("human", "Hi"), said("gpt", "Hello"), said("human", "Why?")]
HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: "
# name of the format, kind, a row, what it becomes
EXAMPLES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    *(
        (
            f"{family}.{name}",
            "pair",
            {"system": "Be kind.", field: "Why?", "chosen": good, "rejected": bad},
            {"prompt": [SYSTEM, *ASKED], "chosen": GOOD, "rejected": BAD},
        )
        for family in ("chatml", "llama3")
        for name, field, good, bad in (
            ("intel", "question", "So.", "No."),
            ("icr", "input", "So.", "No."),
            ("prompt_pairs", "prompt", "So.", "No."),
            ("ultra", "prompt", ends("So."), ends("No.")),
            ("argilla", "instruction", "So.", "No."),
            ("default", "question", "So.", "No."),
        )
    ),
    (
        "chatml.argilla",
        "pair",
        {"input": "Why?", "chosen_response": "So.", "rejected_response": "No."},
        {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
    ),
    (
        "chatml.argilla_chat",
        "pair",
        {"chosen": ends("So."), "rejected": ends("No.")},
        {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
    ),
    (
        "chat_template.argilla_chat",
        "pair",
        {"chosen": [*TALK, *GOOD], "rejected": [*TALK, *BAD]},
        {"prompt": TALK, "chosen": GOOD, "rejected": BAD},
    ),
    (
        "chat_template.default",
        "pair",
        {"messages": TALK, "chosen": GOOD[0], "rejected": "No."},
        {"prompt": TALK, "chosen": GOOD, "rejected": BAD},
    ),
    (
        "chat_template.argilla",
        "pair",
        {"prompt": "Why?", "chosen": ends("So."), "rejected": ends("No.")},
        {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
    ),
    (
        "mistral.prompt_pairs",
        "pair",
        {"prompt": "Why?", "chosen": "So.", "rejected": "No."},
        {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
    ),
    (
        "zephyr.nectar",
        "pair",
        {
            "prompt": "\n\nHuman: Why? \n\nAssistant: ",
            "answers": [{"rank": 3, "answer": "Eh"}, {"rank": 2, "answer": "No."}, {"rank": 1, "answer": "So."}],
        },
        {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
    ),
    (
        "zephyr.nectar",
        "ranked",
        {"prompt": "Why?", "answers": [{"rank": 2.0, "answer": "No."}, {"rank": 1.0, "answer": "So."}]},
        {"prompt": ASKED, "completions": [GOOD, BAD]},
    ),
    ("passthrough", "pair", pair(), pair()),
    ("user_defined.default", "pair", {"system": "Be kind.", **pair()}, pair()),
    *(
        (
            f"{family}.{name}",
            "unpaired",
            {field: "Why?", "completion": "So.", "label": True},
            {"prompt": ASKED, "completion": GOOD, "label": True},
        )
        for family in ("chatml", "llama3")
        for name, field in (
            ("intel", "question"),
            ("argilla", "instruction"),
            ("prompt_pairs", "prompt"),
            ("ultra", "prompt"),
        )
    ),
    (
        "llama3.argilla_chat",
        "unpaired",
        {"completion": [*TALK, *GOOD], "label": False},
        {"prompt": TALK, "completion": GOOD, "label": False},
    ),
    (
        "user_defined",
        "unpaired",
        {"prompt": "Why?", "completion": " So.", "label": 1},
        {"prompt": "Why?", "completion": " So.", "label": 1},
    ),
    (
        "alpaca",
        "pair",
        {"instruction": "Why?", "input": "Tell.", "chosen": "So.", "rejected": "No.", "system": "Be kind."},
        {"prompt": [SYSTEM, user("Why?\nTell.")], "chosen": GOOD, "rejected": BAD},
    ),
    (
        "alpaca",
        "unpaired",
        {"instruction": "Why?", "input": "", "output": "So.", "kto_tag": True},
        {"prompt": ASKED, "completion": GOOD, "label": True},
    ),
    (
        "alpaca",
        "completion",
        {"instruction": "Why?", "output": "So.", "history": [["Hi", "Hello"]]},
        {"prompt": TALK[:1], "completion": [*TALK[1:], *GOOD]},
    ),
    (
        "alpaca_text",
        "completion",
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {
            "prompt": "Below is an instruction that describes a task, paired with an input that provides further "
            "context. Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n"
            "### Input:\n1 2\n\n### Response:\n",
            "completion": "3",
        },
    ),
    (
        "sharegpt",
        "pair",
        {"conversations": SHARED, "chosen": said("gpt", "So."), "rejected": said("gpt", "No.")},
        {"prompt": TALK, "chosen": GOOD, "rejected": BAD},
    ),
    (
        "sharegpt",
        "unpaired",
        {"conversations": [*SHARED, said("gpt", "So.")], "kto_tag": False},
        {"prompt": TALK, "completion": GOOD, "label": False},
    ),
    (
        "sharegpt",
        "completion",
        {"conversations": [*SHARED, said("gpt", "So.")], "system": "Be kind."},
        {"prompt": [SYSTEM, *TALK[:1]], "completion": [*TALK[1:], *GOOD]},
    ),
    (
        "openrlhf",
        "pair",
        {"prompt": TALK, "chosen": GOOD, "rejected": BAD},
        {"prompt": TALK, "chosen": GOOD, "rejected": BAD},
    ),
    (
        "openrlhf",
        "pair",
        {"chosen": [*TALK, *GOOD], "rejected": [*TALK, *BAD], "margin": 2},
        {"prompt": TALK, "chosen": GOOD, "rejected": BAD, "margin": 2},
    ),
    (
        "openrlhf",
        "pair",
        {"input": "Why?", "chosen": " So.", "rejected": " No."},
        {"prompt": "Why?", "chosen": " So.", "rejected": " No."},
    ),
    (
        "openrlhf",
        "unpaired",
        {"input": [*TALK, *GOOD], "label": True},
        {"prompt": TALK, "completion": GOOD, "label": True},
    ),
    ("openrlhf", "completion", {"input": TALK, "output": GOOD}, {"prompt": TALK, "completion": GOOD}),
    ("hh", "pair", {"chosen": HH + "So.", "rejected": HH + "No."}, {"prompt": TALK, "chosen": GOOD, "rejected": BAD}),
    (
        "messages_rejected",
        "pair",
        {"messages": [*TALK, *GOOD], "rejected": "No."},
        {"prompt": TALK, "chosen": GOOD, "rejected": BAD},
    ),
    (
        "messages_rejected",
        "pair",
        {"messages": [*TALK, *GOOD], "rejected_messages": [*TALK, *BAD]},
        {"prompt": TALK, "chosen": GOOD, "rejected": BAD},
    ),
]
# The shapes that need no format: format, kind, a row, options.
CANONICAL: list[tuple[str | None, str, dict[str, Any], dict[str, Any]]] = [
    (None, "pair", pair(), {}),
    (
        None,
        "pair",
        pair([user("Hi")], [assistant("A")], [assistant("B")], weight=1.0, margin=0.5, tools=[{"name": "f"}]),
        {},
    ),
    (None, "pair", {"chosen": [user("Hi"), assistant("A")], "rejected": [user("Hi"), assistant("B")]}, {}),
    (None, "ranked", {"prompt": "Hi", "completions": ["a", "b"], "scores": [1.0, 2.0]}, {}),
    (None, "ranked", {"prompt": [user("Hi")], "completions": [[assistant("A")], [assistant("B")]]}, {}),
    (None, "unpaired", {"prompt": "Hi", "completion": "A", "label": True}, {}),
    (None, "completion", {"messages": [user("Hi"), assistant("A")], "chat_template_kwargs": {"a": 1}}, {}),
    (None, "completion", {"text": "Hi"}, {}),
    (None, "prompt_only", {"prompt": [user("Hi")]}, {}),
]
