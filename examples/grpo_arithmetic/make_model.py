"""A model to begin with, made here in seconds: it has seen sums of two digits of which half were wrong.

`python examples/grpo_arithmetic/make_model.py` writes the folder `model` (character tokenizer, two layers, 0.1 million
weights) and the rows `sums.jsonl` beside this file. Nothing is downloaded.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tether import SFTConfig, SFTTrainer

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
CHARACTERS = "0123456789+="
HERE = Path(__file__).parent


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each character."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *CHARACTERS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")  # type: ignore[assignment]
    made.decoder = decoders.Fuse()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def sums() -> list[dict[str, object]]:
    """The hundred sums of two digits."""
    return [{"prompt": f"{a}+{b}=", "answer": a + b} for a in range(10) for b in range(10)]


def half_wrong(rows: list[dict[str, object]], times: int, seed: int = 0) -> list[dict[str, str]]:
    """Texts in which every second answer is some other number from 0 to 18."""
    draw = random.Random(seed)
    found = []
    for place in range(times * len(rows)):
        row = rows[place % len(rows)]
        answer = row["answer"] if draw.random() < 0.5 else draw.randrange(19)
        found.append({"prompt": str(row["prompt"]), "completion": str(answer)})
    return found


def main(folder: Path, steps: int = 400) -> None:
    """Write model and rows into a folder."""
    rows = sums()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    torch.manual_seed(0)
    words = tokenizer()
    config = LlamaConfig(
        vocab_size=len(words),
        max_position_embeddings=32,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=scratch,
                per_device_train_batch_size=100,
                max_steps=steps,
                learning_rate=3e-3,
                logging_steps=100,
                save_strategy="no",
                report_to="none",
                gradient_checkpointing=False,
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=half_wrong(rows, 40),
            processing_class=words,
        )
        trainer.train()
    shutil.rmtree(folder / "model", ignore_errors=True)
    model.save_pretrained(folder / "model")
    words.save_pretrained(folder / "model")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
