"""The losses of the notebook against TRL's own code, and against the framework's."""

import runpy
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from llm_tricks.notebook import definitions
from utils.data.collate import build_pair_collator
from utils.tasks import dpo_single

nb = definitions("dpo")
SCRIPT = runpy.run_path(str(ROOT / "llm_tricks" / "dpo" / "run.py"))
NAMES = {"dpo": "sigmoid", "ipo": "ipo", "dpo_norm": "sigmoid_norm"}  # ours: TRL's


class Trainer(DPOTrainer):
    """TRL's, for rows that are token ids already."""

    def _prepare_dataset(self, dataset, *_):
        return dataset


class WrittenOut(dpo_single.WrittenOutLoss, DPOTrainer):
    def _prepare_dataset(self, dataset, *_):
        return dataset


def random_pairs(seed: int, count: int = 5) -> list[dict]:
    """Pairs of token ids, all of different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def ids(longest):
        length = int(torch.randint(1, longest, (1,), generator=generator))
        return torch.randint(3, 300, (length,), generator=generator).tolist()

    return [{"prompt_ids": ids(9), "chosen_ids": ids(7), "rejected_ids": ids(14)} for _ in range(count)]


@pytest.fixture(scope="module")
def models(tiny_models):
    """A reference and a policy that has left it."""
    reference = AutoModelForCausalLM.from_pretrained(tiny_models(), dtype=torch.float32)
    policy, generator = deepcopy(reference), torch.Generator().manual_seed(7)
    for weight in policy.parameters():
        weight.data += 0.03 * torch.randn(weight.shape, generator=generator)
    return policy, reference


@pytest.fixture
def trl(models, tiny_models, tmp_path):
    """Loss, gradients and logged figures of TRL's trainer on a batch of pairs."""

    def run(pairs, loss_type, beta, trainer_class=Trainer, collator=None, **options):
        config = DPOConfig(
            output_dir=str(tmp_path), loss_type=loss_type, beta=beta, report_to="none", use_cpu=True, bf16=False,
            gradient_checkpointing=False, **options,
        )  # fmt: skip
        policy, reference = map(deepcopy, models)
        trainer = trainer_class(
            policy, reference, config, train_dataset=Dataset.from_list(pairs),
            processing_class=AutoTokenizer.from_pretrained(tiny_models()),
        )  # fmt: skip
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, (collator or trainer.data_collator)(pairs))
        loss.backward()
        return loss.detach(), gradients_of(policy), {k: v[-1] for k, v in trainer._metrics["train"].items()}

    return run


def gradients_of(model) -> dict:
    return {name: weight.grad for name, weight in model.named_parameters()}


def notebook(models, pairs, name, beta, **options):
    """The same of the notebook's code."""
    policy, reference = deepcopy(models[0]), models[1]
    batch = nb.collate(pairs)
    now, lengths = nb.log_probs(policy, batch)
    with torch.no_grad():
        before, _ = nb.log_probs(reference, batch)
    losses, chosen, rejected = nb.batch_loss(name, now, before, lengths, beta, **options)
    losses.mean().backward()
    # TRL logs the rewards of whole answers, whatever the loss is given
    whole = nb.dpo_loss(*now.chunk(2), *before.chunk(2), beta=beta)[1:]
    if not nb.LOSSES[name][1]:
        torch.testing.assert_close((chosen, rejected), whole)
    figures = {
        "rewards/chosen": whole[0].mean().item(),
        "rewards/rejected": whole[1].mean().item(),
        "rewards/accuracies": (whole[0] > whole[1]).float().mean().item(),
        "logps/chosen": now.chunk(2)[0].mean().item(),
        "logps/rejected": now.chunk(2)[1].mean().item(),
    }
    return losses.mean().detach(), gradients_of(policy), figures


def compare(ours, theirs):
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in ours[1].items():
        torch.testing.assert_close(gradient, theirs[1][name], rtol=1e-4, atol=1e-5, msg=name)
    assert max(gradient.abs().max() for gradient in ours[1].values()) > 1e-3


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("beta", [0.1, 1.5])
@pytest.mark.parametrize("name", NAMES)
def test_loss_gradients_and_rewards_are_trls(models, trl, name, beta, seed):
    pairs = random_pairs(seed)
    ours, theirs = notebook(models, pairs, name, beta), trl(pairs, NAMES[name], beta)
    compare(ours, theirs)
    assert abs(ours[2]["rewards/chosen"]) > 1e-3
    for figure, value in ours[2].items():
        assert value == pytest.approx(theirs[2][figure], rel=1e-4, abs=1e-5), figure


@pytest.mark.parametrize("aot", ["aot", "aot_unpaired"])
@pytest.mark.parametrize("flipped", [0.1, 0.3])
def test_cdpo_is_trls_aot_on_one_pair_at_a_time(models, trl, aot, flipped):
    """With one pair there is nothing to sort, and what is left is the cross-entropy with 1 − ε."""
    pairs = random_pairs(2, count=3)
    for pair in pairs:
        ours = notebook(models, [pair], "cdpo", 0.5, flipped=flipped)
        compare(ours, trl([pair], aot, 0.5, label_smoothing=flipped))


@pytest.mark.parametrize("flipped", [0.1, 0.3])
def test_cdpo_is_trls_sigmoid_on_the_labels_it_expects(models, trl, flipped):
    pairs = random_pairs(3)
    as_labelled, turned = (trl(rows, "sigmoid", 0.5) for rows in (pairs, [nb.swapped(pair) for pair in pairs]))
    ours = notebook(models, pairs, "cdpo", 0.5, flipped=flipped)
    expected = {n: (1 - flipped) * as_labelled[1][n] + flipped * turned[1][n] for n in as_labelled[1]}
    compare(ours, ((1 - flipped) * as_labelled[0] + flipped * turned[0], expected))


def test_ipo_on_sums_is_the_papers_and_not_trls(models, trl):
    """Equation 17, (h − 1/(2τ))², by hand; TRL's averages are another number."""
    log_probs = torch.tensor([[-3.0], [-5.0], [-4.0], [-4.5]])  # h = 1.5
    assert nb.ipo_loss(*log_probs, beta=0.25)[0].item() == pytest.approx((1.5 - 2) ** 2)
    pairs = random_pairs(0)
    now, before = (nb.measure(model, pairs)[0] for model in models)
    on_sums = nb.ipo_loss(*now.chunk(2), *before.chunk(2), beta=0.1)[0].mean()
    assert abs(on_sums - trl(pairs, "ipo", 0.1)[0]) > 0.1


@pytest.mark.parametrize("padding_free", [True, False])
def test_log_probs_and_loss_are_the_frameworks(models, padding_free):
    pairs = random_pairs(4)
    labelled = [pair | {f"{side}_labels": pair[f"{side}_ids"] for side in ("chosen", "rejected")} for pair in pairs]
    with torch.no_grad():
        ours, lengths = nb.log_probs(models[0], nb.collate(pairs))
        theirs, _ = dpo_single.sequence_log_probs(models[0], build_pair_collator(0, padding_free)(labelled))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    assert lengths.tolist() == [len(pair[f"{side}_ids"]) for side in ("chosen", "rejected") for pair in pairs]
    four = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)) * 9
    for mine, other in zip(nb.dpo_loss(*four, 0.1), dpo_single.preference_loss(*four, 0.1), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("change", ["cdpo_loss", "ipo_loss", "preference_loss"])
def test_a_changed_loss_trains_in_the_framework(models, trl, monkeypatch, change):
    """The notebook's function, put in the place of the framework's, is what its trainer uses."""
    loss = getattr(nb, change)
    monkeypatch.setattr(dpo_single, "preference_loss", loss)
    pairs = random_pairs(5)
    labelled = [pair | {f"{side}_labels": pair[f"{side}_ids"] for side in ("chosen", "rejected")} for pair in pairs]
    theirs = trl(labelled, "sigmoid", 0.2, WrittenOut, build_pair_collator(0, True))
    now, before = (nb.measure(model, pairs)[0] for model in models)
    torch.testing.assert_close(
        theirs[0], loss(*now.chunk(2), *before.chunk(2), beta=0.2)[0].mean(), rtol=1e-4, atol=1e-4
    )
    assert abs(theirs[0] - nb.dpo_loss(*now.chunk(2), *before.chunk(2), beta=0.2)[0].mean()) > 1e-3


def test_the_rewards_of_a_changed_loss_are_dpos_and_the_line_for_the_framework_is_cdpo():
    four = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)) * 9
    wanted = nb.dpo_loss(*four, beta=0.3)[1:]
    for loss in (nb.cdpo_loss, nb.ipo_loss, nb.preference_loss):
        torch.testing.assert_close(loss(*four, beta=0.3)[1:], wanted)
    torch.testing.assert_close(nb.preference_loss(*four, beta=0.3)[0], nb.cdpo_loss(*four, beta=0.3, flipped=0.1)[0])


@pytest.mark.parametrize("name", nb.LOSSES)
def test_the_first_loss_of_a_training_is_that_of_its_batch(models, name):
    policy, reference = models
    pairs = random_pairs(8, count=nb.PAIRS_A_STEP)
    (now, lengths), (before, _) = (nb.measure(model, pairs) for model in models)
    loss, per_token = nb.LOSSES[name]
    _, losses, _ = nb.train(policy, pairs, before, loss, 0.5, per_token, steps=1)
    assert losses[0] == pytest.approx(nb.batch_loss(name, now, before, lengths, 0.5)[0].mean().item(), rel=1e-4)


def test_pairs_turned_round_keep_the_reference_of_their_own_answers(models):
    pairs = random_pairs(9)
    reference = nb.measure(models[1], pairs)[0]
    labelled, labels = SCRIPT["turned"](nb, pairs, reference, torch.tensor([True, False, False, True, False]))
    swapped = [one["chosen_ids"] == two["rejected_ids"] for one, two in zip(labelled, pairs, strict=True)]
    assert swapped == [True, False, False, True, False]
    torch.testing.assert_close(labels, nb.measure(models[1], labelled)[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_the_closed_form_is_the_optimum_of_the_objective(beta):
    torch.manual_seed(0)
    reward, reference = torch.randn(6), torch.randn(6).log_softmax(0)
    best, log_z = nb.closed_form(reference, reward, beta)
    assert best.exp().sum().item() == pytest.approx(1, abs=1e-5)
    highest = nb.objective(best, reference, reward, beta)
    assert highest.item() == pytest.approx(beta * log_z.item(), abs=1e-5)
    for _ in range(20):
        assert nb.objective((best + 0.3 * torch.randn(6)).log_softmax(0), reference, reward, beta) < highest
    torch.testing.assert_close(beta * (best - reference) + beta * log_z, reward, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("flipped", [0.1, 0.3])
def test_the_first_solution_is_trls_robust_loss(models, trl, flipped):
    robust_loss = runpy.run_path(str(ROOT / "llm_tricks" / "dpo" / "solutions.py"))["robust_loss"]
    pairs = random_pairs(6)
    now, before = (nb.measure(model, pairs)[0] for model in models)
    ours = robust_loss(*now.chunk(2), *before.chunk(2), beta=0.5, flipped=flipped).mean()
    torch.testing.assert_close(ours, trl(pairs, "robust", 0.5, label_smoothing=flipped)[0], rtol=1e-5, atol=1e-5)


def test_the_second_solution_is_trls_simpo():
    from trl.experimental.cpo import CPOTrainer

    simpo_loss = runpy.run_path(str(ROOT / "llm_tricks" / "dpo" / "solutions.py"))["simpo_loss"]
    torch.manual_seed(0)
    sums, lengths = -20 * torch.rand(2, 7), torch.randint(1, 9, (2, 7))
    settings = SimpleNamespace(
        loss_type="simpo", simpo_gamma=0.7, beta=2.0, label_smoothing=0.0, alpha=0.0,
        accelerator=SimpleNamespace(device=torch.device("cpu")),
    )  # fmt: skip
    theirs = CPOTrainer.cpo_loss(settings, *(sums / lengths))[0]
    torch.testing.assert_close(simpo_loss(*sums, *lengths, beta=2.0, gamma=0.7), theirs)
