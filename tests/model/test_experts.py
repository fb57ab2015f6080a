"""The auxiliary loss of a mixture: trained, left out with a warning, or refused where it was asked for."""

import contextlib
from types import SimpleNamespace

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from utils.model.experts import leave_router_logits_out, resolve_aux_loss
from utils.runtime.errors import UserError


@pytest.fixture
def mixture():
    torch.manual_seed(0)
    config = tiny.config_for("mixtral", 100, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True)
    return AutoModelForCausalLM.from_config(config)


def trainer_of(model, coefficient=0.0, enabled=True):
    """A trainer whose loss is the model's own, so that TRL's fused one is not compared."""
    return SimpleNamespace(
        model=model, aux_loss_enabled=enabled, own_forward=True, is_deepspeed_enabled=False, is_fsdp_enabled=False,
        args=SimpleNamespace(router_aux_loss_coef=coefficient),
        accelerator=SimpleNamespace(autocast=contextlib.nullcontext),
    )  # fmt: skip


def test_router_logits_are_returned_only_where_they_are_asked_for(mixture):
    leave_router_logits_out(None, mixture)
    assert mixture.config.output_router_logits is False
    ids = torch.arange(8)[None]
    assert mixture(input_ids=ids).router_logits is None
    assert mixture(input_ids=ids, output_router_logits=True).aux_loss is not None


def test_a_finite_auxiliary_loss_is_trained_and_the_model_stays_in_its_mode(mixture):
    trainer = trainer_of(mixture.train(), coefficient=0.01)
    resolve_aux_loss(trainer)
    assert trainer.aux_loss_enabled is True and mixture.training
    assert all(weight.grad is None for weight in mixture.parameters())


def test_without_the_loss_nothing_is_computed(mixture):
    mixture.forward = None
    trainer = trainer_of(mixture, enabled=False)
    resolve_aux_loss(trainer)
    assert trainer.aux_loss_enabled is False and mixture.config.output_router_logits is False


@pytest.mark.parametrize(("failure", "reason"), [("nan", "it is nan"), ("raises", "cannot compute it .RuntimeError")])
def test_a_loss_that_the_model_cannot_give_is_left_out_or_refused(mixture, failure, reason):
    def forward(**_):
        if failure == "raises":
            raise RuntimeError("no router")
        return SimpleNamespace(aux_loss=torch.tensor(float("nan")))

    mixture.forward = forward
    trainer = trainer_of(mixture)
    resolve_aux_loss(trainer)
    assert trainer.aux_loss_enabled is False
    with pytest.raises(UserError, match=f"--router_aux_loss_coef 0.5 cannot .* MixtralForCausalLM: .*{reason}"):
        resolve_aux_loss(trainer_of(mixture, coefficient=0.5))
