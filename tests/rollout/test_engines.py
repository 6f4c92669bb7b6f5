"""Engines: what they sample is what the trainer scores, a function of its key alone, and each prompt is computed once
(R1, R2, R3, R20)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import RepetitionPenaltyLogitsProcessor

from policies import lora
from tether.errors import RolloutError, ScoringError
from tether.reference.methods.shards import gathered, is_sharded
from tether.rollout import ReplayEngine, RolloutRequest, Sampling, TransformersEngine, TreeEngine
from tether.rollout.decode import Decoding
from tether.rollout.files import rollout_file, write_rollout
from tether.rollout.proof import as_example, choose_engine, compare, with_penalty
from tether.rollout.records import as_ids
from tether.rollout.sample import draw, uniform
from tether.scoring import pack, score, score_alone
from tether.training.online.function import FunctionEngine
from tiny import CONFIGS, FALLBACK, tiny_model
from tiny_seq2seq import SEQ2SEQ, tiny_seq2seq

STOPS = (2, 7, 13, 21, 34, 55, 60, 80, 90)
SAMPLING = Sampling(1.0, 14, STOPS)
PROMPTS = ([5, 6, 7, 8, 9], [11], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51])


def requests(group=4, prompts=PROMPTS, first=0):
    return [RolloutRequest(as_ids(ids), row, range(first, first + group)) for row, ids in enumerate(prompts)]


def ids_of(groups):
    return [one.ids.tolist() for group in groups for one in group.completions]


def worst(policy, groups, temperature=1.0):
    """Largest difference, in nats, of what was reported from scoring each sequence alone."""
    batch = pack([as_example(group) for group in groups])
    with torch.no_grad():
        alone = (
            score_alone(policy, batch)
            if temperature == 1
            else score(policy, batch, temperature=temperature).token_logps
        )
    return (torch.cat([one.logps for group in groups for one in group.completions]) - alone).abs().max().item()


@pytest.mark.sweep(6)
@pytest.mark.parametrize("family", [name for name in CONFIGS if name not in FALLBACK])
def test_what_is_reported_is_what_scoring_alone_gives(family):
    """R1, for every family that is scored as a tree: windows, soft-caps, sinks, experts, absolute positions."""
    policy = tiny_model(family).eval()
    groups = TreeEngine().generate(policy, requests(), SAMPLING)
    lengths = {len(one.ids) for group in groups for one in group.completions}
    assert len(lengths) > 1, "some branches end while others go on"
    assert max(lengths) > 8, "beyond the window of 7"
    assert worst(policy, groups) < 2e-5
    if family in ("llama", "gpt2", "gpt_oss", "gemma3"):
        assert ids_of(TransformersEngine().generate(policy, requests(), SAMPLING)) == ids_of(groups), "R2"


@pytest.mark.parametrize("family", FALLBACK)
def test_other_families_fall_back_to_generate(family, caplog):
    """The proof chooses, and the line says why; what is then reported is what scoring alone gives."""
    policy = tiny_model(family).eval()
    with caplog.at_level("INFO", "tether"):
        engine = choose_engine("auto", policy, lambda batch: score_alone(policy, batch), requests(), SAMPLING, _nothing)
    assert engine.name == "transformers"
    assert "rollouts: transformers engine" in caplog.text
    assert "tree refused" in caplog.text
    with torch.no_grad():
        assert worst(policy, engine.generate(policy, requests(), SAMPLING)) < 2e-4
    with pytest.raises((RolloutError, ScoringError)), torch.no_grad():
        choose_engine("tree", policy, lambda batch: score_alone(policy, batch), requests(), SAMPLING, _nothing)


def _nothing():
    return torch.no_grad()


def test_a_branch_that_reads_its_sibling_is_caught(monkeypatch):
    """R1's control: rows that exchange their keys are far from scoring alone, and no engine is chosen."""
    own = Decoding._own
    monkeypatch.setattr(Decoding, "_own", lambda *given: tuple(part.flip(0) for part in own(*given)))
    policy = tiny_model().eval()
    assert worst(policy, TreeEngine().generate(policy, requests(), SAMPLING)) > 1e-2
    found = compare(TreeEngine(), policy, lambda batch: score(policy, batch).token_logps.detach(), requests(), SAMPLING)
    assert not found.holds
    with pytest.raises(RolloutError, match=r"tree refused: .* nats from the trainer's log-probs, .* allowed are"):
        choose_engine(
            "tree", policy, lambda batch: score(policy, batch).token_logps.detach(), requests(), SAMPLING, _nothing
        )


def test_all_processes_take_one_engine(caplog):
    """What fits here and not in another process is nobody's, as scoring may take all of them."""
    policy, told = tiny_model().eval(), []

    def not_the_first(held):
        told.append(held)
        return held and len(told) > 1

    with caplog.at_level("INFO", "tether"):
        engine = choose_engine(
            "auto",
            policy,
            lambda batch: score_alone(policy, batch),
            requests(),
            SAMPLING,
            _nothing,
            everywhere=not_the_first,
        )
    assert engine.name == "transformers"
    assert "tree refused: by another process" in caplog.text
    assert told == [True, True, True], "one answer before the first engine is scored, two for the second"


@pytest.fixture
def process():
    """A group of one process, which FSDP2 shards among."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("engine", [TreeEngine(), TransformersEngine()], ids=["tree", "transformers"])
@pytest.mark.parametrize("gives_up", [True, False])
def test_a_policy_in_shards_is_whole_while_it_samples(process, engine, gives_up):
    """No forward gathers or gives up a weight, what an update changed is seen, and all is as it was afterwards."""
    expected = [ids_of(engine.generate(tiny_model(seed=seed).eval(), requests(), SAMPLING)) for seed in (0, 1)]
    policy = get_peft_model(tiny_model().eval(), lora(init_lora_weights=True))
    for layer in policy.base_model.model.model.layers:
        fully_shard(layer, reshard_after_forward=gives_up)
    fully_shard(policy, reshard_after_forward=gives_up)
    states = [module._get_fsdp_state() for module in policy.modules() if hasattr(module, "unshard")]
    held = [[group.post_forward_mesh_info for group in state._fsdp_param_groups] for state in states]
    whole: list[bool] = []
    policy.base_model.model.lm_head.register_forward_hook(lambda *_: whole.append(_cut(policy) == 0))
    assert ids_of(engine.generate(policy, requests(), SAMPLING)) == expected[0]
    sampled, shards = len(whole), dict(policy.named_parameters())
    with torch.no_grad():
        policy(input_ids=torch.tensor([[1, 2]]))
        assert is_sharded(policy), "also where the forward has kept what it gathered"
        for name, value in tiny_model(seed=1).named_parameters():
            within = f"base_model.model.{name}"
            found = shards.get(within, shards.get(within.replace("_proj.", "_proj.base_layer.")))
            found.to_local().copy_(value)
    assert ids_of(engine.generate(policy, requests(), SAMPLING)) == expected[1]
    with gathered(policy):
        with gathered(policy):
            pass
        assert _cut(policy) == 0, "the inner one gives nothing up"
    FunctionEngine(_writes_while(lambda: _cut(policy) == 0), None, tuple).generate(policy, requests(), SAMPLING)
    assert sampled > 8
    assert all(whole[:sampled]), "every weight is whole after every forward of a rollout"
    assert _cut(policy) == len(list(policy.parameters())), "and in shards again"
    after = [[group.post_forward_mesh_info for group in state._fsdp_param_groups] for state in states]
    assert after[1:] == held[1:], "the outermost one alone is changed by torch, at its first forward"


def _writes_while(holds):
    """A `rollout_func` of one token a completion."""

    def function(prompts, trainer):
        assert holds()
        ids = [list(prompt) for prompt in PROMPTS for _ in range(4)]
        return {"prompt_ids": ids, "completion_ids": [[2]] * len(ids), "logprobs": None}

    return function


def _cut(policy):
    return sum(isinstance(parameter, DTensor) for parameter in policy.parameters())


def test_a_completion_depends_on_nothing_but_its_key():
    """R2: alone, in a larger group, with other prompts, in parts, on another call, with another process' branches."""
    policy = tiny_model().eval()
    whole = TreeEngine().generate(policy, requests(8), SAMPLING)
    assert ids_of(TreeEngine().generate(policy, requests(8), SAMPLING)) == ids_of(whole)
    assert ids_of(TreeEngine(tokens=1).generate(policy, requests(8), SAMPLING)) == ids_of(whole)
    four = TreeEngine().generate(policy, requests(4), SAMPLING)
    assert ids_of(four) == [ids for group in whole for ids in ids_of([group])[:4]]
    last = TreeEngine().generate(policy, requests(4, first=4), SAMPLING)
    assert ids_of(last) == [ids for group in whole for ids in ids_of([group])[4:]]
    for number, request in enumerate(requests(8)):
        assert ids_of(TreeEngine().generate(policy, [request], SAMPLING)) == ids_of([whole[number]])
    assert len({tuple(ids) for ids in ids_of(whole)}) > 20, "and not on the prompt alone"
    for other in (replace(SAMPLING, seed=1), SAMPLING):
        again = [replace(one, number=1) for one in requests(8)] if other is SAMPLING else requests(8)
        assert ids_of(TreeEngine().generate(policy, again, other)) != ids_of(whole)


def test_each_prompt_is_computed_once_and_a_finished_branch_no_more():
    """R3: prompt tokens, and one row for each further token of each completion; control: `generate` reads more."""
    policy, seen = tiny_model().eval(), []
    policy.get_input_embeddings().register_forward_hook(lambda module, given, out: seen.append(given[0].numel()))
    groups = TreeEngine().generate(policy, requests(8), SAMPLING)
    assert seen[0] == sum(map(len, PROMPTS))
    further = sum(len(ids) - 1 for ids in ids_of(groups))
    assert sum(seen[1:]) == further
    seen.clear()
    TransformersEngine().generate(policy, requests(8), SAMPLING)
    assert seen[0] >= 8 * sum(map(len, PROMPTS))
    assert sum(seen[1:]) > further


def test_all_stop_tokens_end_a_completion_and_are_its_last():
    """R20."""
    policy = tiny_model().eval()
    for engine in (TreeEngine(), TransformersEngine()):
        for group in engine.generate(policy, requests(16), SAMPLING):
            for one in group.completions:
                ended = set(STOPS) & set(one.ids.tolist())
                assert one.finish == ("stop" if ended else "length")
                assert len(one.ids) == 14 or int(one.ids[-1]) in STOPS
                assert not set(STOPS) & set(one.ids[:-1].tolist())
    ends = {ids[-1] for ids in ids_of(TreeEngine().generate(policy, requests(64), SAMPLING))}
    assert set(STOPS) <= ends


def test_temperature_is_that_of_what_is_drawn_and_reported():
    policy = tiny_model("gemma2").eval()
    warm = replace(SAMPLING, temperature=1.7)
    for engine in (TreeEngine(), TransformersEngine()):
        groups = engine.generate(policy, requests(), warm)
        assert worst(policy, groups, 1.7) < 2e-5
        assert worst(policy, groups) > 1e-2
    assert ids_of(groups) != ids_of(TreeEngine().generate(policy, requests(), SAMPLING))


@pytest.mark.parametrize("cut", [{"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.2}])
def test_a_cut_is_reported_apart_from_the_log_probs(cut):
    """TRL #6789: log-probs are those of the whole distribution, and the mass that was left stands beside them."""
    policy = tiny_model().eval()
    sampling = replace(SAMPLING, **cut)
    groups = TreeEngine().generate(policy, requests(), sampling)
    assert worst(policy, groups) < 2e-5
    batch = pack([as_example(group) for group in groups])
    probs = score_probs(policy, batch)
    kept = torch.cat([one.kept for group in groups for one in group.completions])
    for row, target, mass in zip(probs, batch.targets.tolist(), kept.tolist(), strict=True):
        order = row.sort(descending=True).values
        if "top_k" in cut:
            wanted = order[:5].sum()
        elif "top_p" in cut:
            wanted = order[: int((order.cumsum(0) < 0.6).sum()) + 1].sum()
        else:
            wanted = row[row >= 0.2 * order[0]].sum()
        assert mass == pytest.approx(wanted.item(), abs=1e-5)
        assert row[target] >= (order[4] if "top_k" in cut else 0.0) - 1e-6
    assert ids_of(TransformersEngine().generate(policy, requests(), sampling)) == ids_of(groups)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_repetition_penalty_is_that_of_transformers(temperature):
    """Tokens of prompt and completion, not those of padding; reported is what was drawn from, here by its processor."""
    policy = tiny_model().eval()
    sampling = replace(SAMPLING, repetition_penalty=1.8, temperature=temperature)
    groups = TreeEngine().generate(policy, requests(), sampling)
    assert ids_of(groups) == ids_of(TransformersEngine().generate(policy, requests(), sampling))
    assert ids_of(groups) != ids_of(TreeEngine().generate(policy, requests(), replace(sampling, repetition_penalty=1)))
    processor = RepetitionPenaltyLogitsProcessor(1.8)
    for group in groups:
        for one in group.completions:
            ids = torch.cat([group.prompt, one.ids])[None]
            with torch.no_grad():
                logits = policy(input_ids=ids).logits[0].float()
            for place in range(len(one.ids)):
                end = len(group.prompt) + place
                logps = (processor(ids[:, :end], logits[None, end - 1]) / temperature).log_softmax(-1)[0]
                assert one.logps[place].item() == pytest.approx(logps[one.ids[place]].item(), abs=2e-5)
    batch = pack([as_example(group) for group in groups])
    with torch.no_grad():
        scores = score(policy, batch, outputs=("hidden",), temperature=temperature)
    known = with_penalty(scores, batch, 1.8)
    assert (known - torch.cat([one.logps for group in groups for one in group.completions])).abs().max() < 2e-5


def test_an_encoder_decoder_repeats_what_its_decoder_is_given():
    policy = tiny_seq2seq("bart").eval()
    sampling = replace(SAMPLING, repetition_penalty=1.8)
    processor, prompt = RepetitionPenaltyLogitsProcessor(1.8), torch.tensor([PROMPTS[0]])
    for one in TransformersEngine().generate(policy, requests(prompts=PROMPTS[:1]), sampling)[0].completions:
        given = torch.cat([torch.tensor([policy.config.decoder_start_token_id]), one.ids])[None]
        with torch.no_grad():
            logits = policy(input_ids=prompt, decoder_input_ids=given).logits[0].float()
        for place in range(len(one.ids)):
            logps = processor(given[:, : place + 1], logits[None, place]).log_softmax(-1)[0]
            assert one.logps[place].item() == pytest.approx(logps[one.ids[place]].item(), abs=2e-5)


def score_probs(policy, batch):
    with torch.no_grad():
        scores = score(policy, batch, outputs=("hidden",))
        return scores.head(scores.hidden).softmax(-1)


def test_draws_have_the_distribution_that_they_are_drawn_from():
    """2,000 keys: each token's share within four standard errors; and a uniform number is below 1."""
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    keys = [number.to_bytes(4, "little") for number in range(2000)]
    drawn = draw(probs.log().expand(len(keys), -1), keys, 0, Sampling(1.0, 1, ()))
    shares = torch.bincount(drawn.ids, minlength=5) / len(keys)
    assert ((shares - probs).abs() <= 4 * (probs * (1 - probs) / len(keys)).sqrt()).all()
    assert drawn.logps.tolist() == pytest.approx(probs.log()[drawn.ids].tolist())
    numbers = [uniform(key, place) for key in keys for place in range(3)]
    assert 0 <= min(numbers) < 0.01
    assert 0.99 < max(numbers) < 1


def test_an_adapter_samples_as_it_is_scored_and_stays_in_training_mode():
    policy = get_peft_model(tiny_model(), lora(init_lora_weights=False)).train()
    groups = TreeEngine().generate(policy, requests(), SAMPLING)
    assert policy.training
    assert worst(policy.eval(), groups) < 2e-5
    assert ids_of(groups) != ids_of(TreeEngine().generate(tiny_model(), requests(), SAMPLING))


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize("rows", [64, 3])
def test_virtual_tokens_of_prompt_tuning_stand_right_before_each_prompt(rows):
    """Prompts of one length are sampled together: padding would stand between the two."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    policy = get_peft_model(tiny_model(), config).eval()
    groups = TransformersEngine(rows=rows).generate(policy, requests(), SAMPLING)
    batch = pack([as_example(group) for group in groups])
    with torch.no_grad():
        scored = score(policy, batch, layout="padded").token_logps
    assert (torch.cat([one.logps for group in groups for one in group.completions]) - scored).abs().max() < 2e-5


def test_kept_rollouts_come_back_as_they_were(tmp_path):
    """R16's ground: ids, log-probs and masks to the bit; other rows are refused by name."""
    policy = tiny_model().eval()
    asked = [replace(one, number=3) for one in requests()]
    groups = TreeEngine().generate(policy, asked, replace(SAMPLING, top_k=20))
    path = rollout_file(tmp_path, 3, 0)
    write_rollout(path, groups, ["text"] * 12, engine="tree", sampling=SAMPLING)
    assert [file.name for file in path.parent.iterdir()] == ["000003-0.parquet"]
    found = ReplayEngine(tmp_path).generate(policy, asked, SAMPLING)
    for mine, theirs in zip(groups, found, strict=True):
        for one, other in zip(mine.completions, theirs.completions, strict=True):
            assert one.ids.equal(other.ids)
            assert one.logps.equal(other.logps)
            assert one.kept.equal(other.kept)
            assert one.finish == other.finish
    with pytest.raises(RolloutError, match="row 0 in rollout 4 was not kept"):
        ReplayEngine(tmp_path).generate(policy, [replace(asked[0], number=4)], SAMPLING)
    with pytest.raises(RolloutError, match="row 0 in rollout 3 has another prompt"):
        ReplayEngine(tmp_path).generate(policy, [replace(asked[0], prompt_ids=as_ids([1]))], SAMPLING)
    with pytest.raises(RolloutError, match="There are no rollouts in"):
        ReplayEngine(tmp_path / "nowhere")


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_encoder_decoders_sample_by_generate(family):
    """The decoder's own start token; what is reported is what scoring gives."""
    policy = tiny_seq2seq(family).eval()

    def scored(batch):
        with torch.no_grad():
            return score(policy, batch, layout="encoder_decoder").token_logps

    engine = choose_engine("auto", policy, scored, requests(), SAMPLING, _nothing)
    assert engine.name == "transformers"
    groups = engine.generate(policy, requests(), SAMPLING)
    batch = pack([as_example(group) for group in groups])
    reported = torch.cat([one.logps for group in groups for one in group.completions])
    assert (scored(batch) - reported).abs().max().item() < 2e-5
