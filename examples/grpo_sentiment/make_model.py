"""A small writer of film reviews, made here in about a minute: it has read the continuations of `examples/imdb`.

`python examples/grpo_sentiment/make_model.py` writes the folder `model` beside this file: a byte-pair tokenizer of
1,500 tokens and a model of three layers and 0.8 million weights, which has read praise and scorn after each prompt.
Nothing is downloaded.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tether import SFTConfig, SFTTrainer

HERE = Path(__file__).resolve().parent
PAIRS = HERE.parent / "imdb" / "pairs.jsonl"
SPECIAL = ["<pad>", "<s>", "</s>"]


def texts() -> list[str]:
    """Each prompt of the pairs with its preferred continuation, and with the other one."""
    rows = [json.loads(line) for line in PAIRS.read_text("utf-8").splitlines()]
    return [row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")]


def tokenizer(read: list[str]) -> PreTrainedTokenizerFast:
    """Pairs of bytes that are frequent in the texts."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        read,
        trainers.BpeTrainer(vocab_size=1500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    pad, begin, end = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token=pad, bos_token=begin, eos_token=end)


def main(folder: Path, steps: int = 200) -> None:
    """Write the model into a folder."""
    torch.manual_seed(0)
    read = texts()
    words = tokenizer(read)
    config = LlamaConfig(
        vocab_size=len(words),
        max_position_embeddings=128,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        tie_word_embeddings=True,
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
                per_device_train_batch_size=48,
                max_steps=steps,
                learning_rate=3e-3,
                logging_steps=50,
                save_strategy="no",
                report_to="none",
                gradient_checkpointing=False,
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=[{"text": one} for one in read],
            processing_class=words,
        )
        trainer.train()
    shutil.rmtree(folder / "model", ignore_errors=True)
    model.save_pretrained(folder / "model")
    words.save_pretrained(folder / "model")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
