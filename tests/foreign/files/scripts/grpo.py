"""GRPO with reward functions of the script's own and of TRL's."""

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer, ModelConfig, ScriptArguments, TrlParser, get_peft_config
from trl.rewards import get_soft_overlong_punishment, think_format_reward

SYSTEM_PROMPT = "Think first, between <think> and </think>."


def distinct(completions, **kwargs):
    return [len(set(completion[0]["content"].lower())) for completion in completions]


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, GRPOConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config()

    dataset = load_dataset(script_args.dataset_name, split=script_args.dataset_train_split)

    def make_conversation(example):
        return {"prompt": [{"role": "system", "content": SYSTEM_PROMPT}, *example["prompt"]]}

    dataset = dataset.map(make_conversation)

    trainer = GRPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        reward_funcs=[distinct, think_format_reward, get_soft_overlong_punishment(8, 4)],
        train_dataset=dataset,
        peft_config=get_peft_config(model_args),
    )
    trainer.train()
    trainer.save_model(training_args.output_dir)
