"""The contract of every method of a reference: one meaning, one set of numbers, whatever computes them.

The table `METHODS` has each method that can compute the policy's start; the laws below hold for each of them, for an
adapter that is new, one that has learnt, and full fine-tuning, with and without gradient checkpointing, in both
layouts, and with dropout in the policy. A method that is not in the table is noticed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model

from completions_server import serving
from policies import PROBE, lora, take_steps
from store_runs import lora as lora_of_run
from store_runs import policy as policy_of_run
from store_runs import trainer
from tether.data import example_from_row
from tether.models.structure import evaluation_mode, trainable_tensors
from tether.reference import SAME, ReferenceSpec, RemoteOptions, StoredReference, resolve
from tether.reference.base import frozen_pass
from tether.reference.spec import METHODS as METHODS_OF
from tether.scoring import pack, score
from tether.scoring.layout.proof import score_alone
from tiny import VOCABULARY, pair_rows, ragged_examples, tiny_model

TWO_PROGRAMS = 2e-5  # nats: the server computes without this package


def full():
    return tiny_model(dropout=True, attention_dropout=0.3, vocab_size=VOCABULARY + 1)


def new_adapter():
    return get_peft_model(full(), lora(lora_dropout=0.3))


def learnt_adapter():
    model = new_adapter()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model


KINDS = {"lora": new_adapter, "continued lora": learnt_adapter, "full": full}


def with_twin(policy):
    """A frozen second adapter beside the policy's, which holds what that one holds now."""
    policy.add_adapter("twin", lora())
    state = dict(policy.named_parameters())
    with torch.no_grad():
        for name, parameter in state.items():
            if ".twin." in name:
                parameter.copy_(state[name.replace(".twin.", ".default.")])
                parameter.requires_grad_(False)


@dataclass(frozen=True)
class Setting:
    """What a method is made from."""

    policy: torch.nn.Module
    scorer: Callable
    folder: object
    url: str

    def resolved(self, **declared):
        spec = ReferenceSpec(**declared)
        return resolve(spec, self.policy, PROBE, self.scorer, lambda _: self.scorer).reference


def adapter_on(setting):
    with_twin(setting.policy)
    return setting.resolved(meaning="adapter", adapter="twin")


def released(setting):
    """A snapshot that is on disk before each pass, as after a full store."""
    reference = setting.resolved(method="snapshot", spill=setting.folder)
    scored = reference.score

    def score_from_disk(batch):
        reference.release()
        assert not reference.resident
        return scored(batch)

    reference.score = score_from_disk
    return reference


def another_object(setting):
    other = copy.deepcopy(setting.policy)
    return setting.resolved(meaning="model", model=other, source="a copy")


def cold_store(setting):
    return StoredReference(setting.resolved(), setting.folder, "float32")


def warm_store(setting):
    """Filled by one method, read by another that must not run."""
    with StoredReference(setting.resolved(method="model"), setting.folder, "float32").store as store:
        filler = StoredReference(setting.resolved(method="model"), setting.folder, "float32")
        filler.score(PROBE)
        filler.store.flush()
        assert store.namespace == filler.store.namespace
    live = setting.resolved()
    live.score = None
    return StoredReference(live, setting.folder, "float32")


def remote(setting):
    return setting.resolved(method="remote", remote=RemoteOptions(setting.url, retries=0))


@dataclass(frozen=True)
class Method:
    """How it is made, of what it can be the start, and what else is true of it."""

    build: Callable
    kinds: tuple[str, ...] = tuple(KINDS)
    tolerance: float = SAME
    same_fingerprint: bool = True


METHODS = {
    "adapter_off": Method(lambda setting: setting.resolved(method="adapter_off"), ("lora",)),
    "adapter_on": Method(adapter_on, ("lora", "continued lora"), same_fingerprint=False),
    "snapshot on the device": Method(lambda setting: setting.resolved(method="snapshot", keep="device")),
    "snapshot in host memory": Method(lambda setting: setting.resolved(method="snapshot", keep="host")),
    "snapshot on disk": Method(released, ("full",)),
    "model, forced": Method(lambda setting: setting.resolved(method="model")),
    "model, given": Method(another_object, same_fingerprint=False),
    "store, cold": Method(cold_store),
    "store, warm": Method(warm_store),
    "remote": Method(remote, tolerance=TWO_PROGRAMS),
}
CASES = [pytest.param(name, kind, id=f"{name}-{kind}") for name, method in METHODS.items() for kind in method.kinds]


def checkpointed(policy):
    base = policy.get_base_model() if isinstance(policy, PeftModel) else policy
    base._set_gradient_checkpointing(True, partial(torch.utils.checkpoint.checkpoint, use_reentrant=False))


def state_of(policy):
    """Everything that a pass must leave as it was."""
    return (
        {name: value.clone() for name, value in policy.state_dict().items()},
        {name: parameter.requires_grad for name, parameter in policy.named_parameters()},
        {name: module.training for name, module in policy.named_modules()},
        getattr(policy, "active_adapters", None),
    )


def same_state(before, after):
    return all(torch.equal(value, after[0][name]) for name, value in before[0].items()) and before[1:] == after[1:]


def require_the_start(reference, start, tolerance):
    """The law itself: float32 without gradient, and the start's numbers, however the batch is put together."""
    values = reference.score(PROBE).token_logps
    assert values.dtype == torch.float32
    assert not values.requires_grad
    torch.testing.assert_close(values, start, atol=tolerance, rtol=0)
    pieces = [reference.score(pack([example])).token_logps for example in ragged_examples()]
    torch.testing.assert_close(torch.cat(pieces), start, atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    ("layout", "checkpointing"),
    [("tree", False), ("tree", True), ("padded", True)],
    ids=["tree-plain", "tree-checkpointing", "padded-checkpointing"],
)
@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.sweep(12)
def test_every_means_gives_the_start_and_leaves_the_policy_alone(name, kind, checkpointing, layout, tmp_path):
    """INV-1, 2, 4, 10, 12, 21: before and after updates, with dropout on in the policy; the oracle is a frozen copy."""
    policy, method = KINDS[kind](), METHODS[name]
    if checkpointing:
        checkpointed(policy)
    policy.train()
    scorer, oracle = partial(score, layout=layout), copy.deepcopy(policy)
    with frozen_pass(oracle):
        start = score_alone(oracle, PROBE)
    with evaluation_mode(policy), serving(copy.deepcopy(policy)) as server:
        reference = method.build(Setting(policy, scorer, tmp_path, server.url))
        policy.train()
        first = reference.score(PROBE).token_logps
        for _ in range(2):
            before = state_of(policy)
            require_the_start(reference, start, max(method.tolerance, 2e-5))
            torch.testing.assert_close(reference.score(PROBE).token_logps, first, atol=method.tolerance, rtol=0)
            assert same_state(before, state_of(policy))
            assert take_steps(policy, 1) > 1e-4
    if method.same_fingerprint:
        plain = resolve(ReferenceSpec(), KINDS[kind](), PROBE, scorer, lambda _: scorer).reference
        assert reference.identity.fingerprint == plain.identity.fingerprint


def test_the_law_is_broken_by_a_reference_that_moves_along():
    """Negative control: the policy itself passes before the first update and fails after it."""
    policy = new_adapter().train()

    class Itself:
        def score(self, batch):
            with frozen_pass(policy):
                return score(policy, batch)

    with frozen_pass(policy):
        start = score_alone(policy, PROBE)
    require_the_start(Itself(), start, 2e-5)
    take_steps(policy, 1)
    with pytest.raises(AssertionError):
        require_the_start(Itself(), start, 2e-5)


def test_the_table_has_every_means():
    """A method that is added to the product is added here."""
    covered = {name.split()[0].rstrip(",") for name in METHODS}
    assert covered == {method for meaning, allowed in METHODS_OF.items() for method in allowed if meaning != "none"} | {
        "store"
    }


# -- in a run: evaluation on rows that came after training, and what else a run does -----------------------------------

RUNS = {
    "adapter_off": {"peft_config": True},
    "snapshot": {},
    "snapshot of an adapter": {"peft_config": True, "reference": "start", "reference_method": "snapshot"},
    "snapshot in host memory": {"reference_snapshot": "host"},
    "model, forced": {"reference": "start", "reference_method": "model"},
    "model, given": {"ref_model": True},
    "model beside an adapter": {"ref_model": True, "peft_config": True},
    "remote": {"reference_remote": True, "reference": "start"},
}


def made(name, folder, url, **changes):
    arguments = dict(RUNS[name]) | changes
    if arguments.pop("peft_config", False):
        arguments["peft_config"] = lora_of_run()
    if arguments.pop("ref_model", False):
        arguments["ref_model"] = policy_of_run()
    if arguments.pop("reference_remote", False):
        arguments["reference_remote"] = {"url": url}
    return trainer(folder, num_train_epochs=1, reference_check_steps=1, **arguments)


@pytest.mark.parametrize(
    ("store", "checkpointing"), [(False, True), (True, False)], ids=["live-checkpointing", "store-plain"]
)
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.sweep(1)
def test_new_rows_are_evaluated_right_after_training(name, store, checkpointing, tmp_path):
    """INV-2, 15: by every method, also when a full store let the weights go; nothing else that a run does moves it."""
    late = Dataset.from_list(pair_rows(30)[20:])
    with serving(policy_of_run()) as server:
        stored = {"reference_store": str(tmp_path / "store")} if store else {}
        run = made(name, tmp_path / "run", server.url, gradient_checkpointing=checkpointing, **stored)
        live = run.run.reference.live
        before = live.score(run.run.probe).token_logps
        run.train()
        losses = [log["loss"] for log in run.state.log_history if "loss" in log]
        assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
        assert losses[-1] != pytest.approx(math.log(2), abs=1e-3)
        found = run.evaluate(late)
        # By hand: the policy now against a frozen copy of the start, row by row.
        start, margins = policy_of_run().eval(), []
        for row in run.run.data.prepare("by hand", late).dataset:
            batch = pack([example_from_row(row)])
            with frozen_pass(run.policy), frozen_pass(start):
                chosen, rejected = (
                    score(run.policy, batch).logps
                    - replace(score(run.policy, batch), token_logps=score_alone(start, batch)).logps
                ).tolist()
            margins.append(0.1 * (chosen - rejected))
        expected = -torch.nn.functional.logsigmoid(torch.tensor(margins)).mean().item()
        assert found["eval_loss"] == pytest.approx(expected, abs=1e-4)
        with torch.no_grad():
            run.policy.generate(run.run.probe.input_ids[:, :4], max_new_tokens=3, do_sample=False)
        run.save_model(str(tmp_path / "saved"))
        torch.testing.assert_close(live.score(run.run.probe).token_logps, before, atol=SAME, rtol=0)
        assert set(trainable_tensors(run.policy))
