"""An adapter, a configuration with several losses, and metrics of the evaluation."""

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

dataset = load_dataset("someone/ultrafeedback_binarized")

training_args = DPOConfig(
    output_dir="out/quickstart-peft",
    loss_type=["sigmoid", "bco_pair", "sft"],
    loss_weights=[0.8, 0.2, 1.0],
    model_init_kwargs={"dtype": torch.float32},
    learning_rate=1e-5,
    max_steps=2,
    logging_steps=1,
    per_device_train_batch_size=12,
    eval_strategy="steps",
    eval_steps=2,
    report_to="none",
    bf16=False,
)
trainer = DPOTrainer(
    "Qwen/Qwen3-0.6B",
    args=training_args,
    train_dataset=dataset["train"],
    eval_dataset=dataset["test"],
    peft_config=LoraConfig(),
)

trainer.train()
trainer.log_metrics("eval", trainer.evaluate())
