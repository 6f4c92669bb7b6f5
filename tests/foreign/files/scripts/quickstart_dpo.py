"""The first example of DPO's page."""

from datasets import load_dataset
from trl import DPOTrainer

trainer = DPOTrainer(
    model="Qwen/Qwen3-0.6B",
    train_dataset=load_dataset("someone/ultrafeedback_binarized", split="train"),
)
trainer.train()
