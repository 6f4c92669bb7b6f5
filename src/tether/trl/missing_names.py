"""Names that TRL has, or had, and that are not here: what to write in place of each."""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_PACKAGE = __name__.rpartition(".")[0]
_ONLINE = "Of trainers that sample completions there are GRPOTrainer, RLOOTrainer and OnlineDPOTrainer"
_PAIRS = "DPOTrainer has its losses of pairs (loss_type), KTOTrainer those of labels"
_PACKED = "Rows are packed without padding by the trainer. Pass them as they are"
# Name to the sentence that says what to do.
ABSENT: dict[str, str] = {
    "SyncRefModelCallback": "Set sync_ref_model=True in the configuration, and its steps in ref_model_sync_steps",
    "WeaveCallback": "Use tether.trl.LogCompletionsCallback, which writes completions.jsonl into the run folder",
    "BEMACallback": "It keeps weights that no checkpoint here would hold. Leave it out",
    "WinRateCallback": "`tether eval` compares completions by a judge after the run. Leave it out",
    "MergeModelCallback": "Merge after the run. Leave it out",
    "DistillationTrainer": "Nothing here learns from a teacher's distribution. Keep TRL for it",
    "DistillationConfig": "Nothing here learns from a teacher's distribution. Keep TRL for it",
    "GKDTrainer": "Nothing here learns from a teacher's distribution. Keep TRL for it",
    "GKDConfig": "Nothing here learns from a teacher's distribution. Keep TRL for it",
    "PPOTrainer": _ONLINE,
    "PPOConfig": _ONLINE,
    "NashMDTrainer": _ONLINE,
    "NashMDConfig": _ONLINE,
    "XPOTrainer": _ONLINE,
    "XPOConfig": _ONLINE,
    "BCOTrainer": "Use DPOTrainer with loss_type='bco_pair' on pairs",
    "BCOConfig": "Use DPOConfig with loss_type='bco_pair' on pairs",
    "PRMTrainer": "Rewards for each step of an answer are not trained here; RewardTrainer judges whole answers",
    "PRMConfig": "Rewards for each step of an answer are not trained here; RewardTrainer judges whole answers",
    "AlignPropTrainer": "Images are not generated here. Keep TRL for it",
    "DDPOTrainer": "Images are not generated here. Keep TRL for it",
    "IterativeSFTTrainer": "Use SFTTrainer, once for each set of rows",
    "AutoModelForCausalLMWithValueHead": f"A value head is of PPO. {_ONLINE}",
    "AutoModelForSeq2SeqLMWithValueHead": f"A value head is of PPO. {_ONLINE}",
    "pack_dataset": _PACKED,
    "ConstantLengthDataset": _PACKED,
    "DataCollatorForCompletionOnlyLM": "Set completion_only_loss=True or assistant_only_loss=True in SFTConfig",
    "DPODataCollatorWithPadding": _PACKED,
    "RewardDataCollatorWithPadding": _PACKED,
    "setup_chat_format": "Use tether.trl.clone_chat_template, or set chat_template of the tokenizer",
    "add_response_schema": "Tools are not called during a run here. Leave it out",
    "supports_tool_calling": "Tools are not called during a run here. Leave it out",
    "FDivergenceConstants": f"Set f_divergence_type and f_alpha_divergence_coef in DPOConfig. {_PAIRS}",
    "FDivergenceType": "Give f_divergence_type as text in DPOConfig, such as 'reverse_kl'",
    "BaseBinaryJudge": "Judges are in tether.evaluate",
    "BaseJudge": "Judges are in tether.evaluate",
    "BasePairwiseJudge": "Judges are in tether.evaluate",
    "HfPairwiseJudge": "Judges are in tether.evaluate",
    "OpenAIPairwiseJudge": "Judges are in tether.evaluate",
    "PairRMJudge": "Judges are in tether.evaluate",
}


def refuse_name(module: str, name: str) -> Exception:
    """The error of a name that a module does not have: a sentence for one of TRL's."""
    if name in ABSENT:
        return ImportError(f"{module} has no {name}. {ABSENT[name]}.")
    return AttributeError(f"module {module!r} has no attribute {name!r}")


class _AbsentModules(MetaPathFinder, Loader):
    """Says of a module of TRL that is not here where its names are; asked last, when nobody has found it."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Of a module of this package, one whose import is refused; who only looks for it gets no error."""
        return ModuleSpec(fullname, self) if fullname.startswith(f"{_PACKAGE}.") else None

    def create_module(self, spec: ModuleSpec) -> None:
        """Refuse the import.

        Raises:
            ModuleNotFoundError: always.
        """
        part = spec.name.rpartition(".")[2].replace("_", "")
        advice = next((f"{why}. " for name, why in ABSENT.items() if name.lower() == f"{part}trainer"), "")
        raise ModuleNotFoundError(
            f"There is no module {spec.name}. {advice}TRL's names are in one place here, `from {_PACKAGE} import …`, "
            f"its rewards in {_PACKAGE}.rewards; of its experimental trainers there are cpo, kto, online_dpo and orpo.",
            name=spec.name,
        )

    def exec_module(self, module: ModuleType) -> None:
        """Never called."""


sys.meta_path.append(_AbsentModules())
