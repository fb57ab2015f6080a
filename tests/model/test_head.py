"""The head's log-probabilities, computed without all logits at once."""

import pytest
import torch
from small_models import small


@pytest.mark.parametrize("kind", ["llama4_text", "inkling_text", "recurrent_gemma", "qwen2"])
def test_log_probabilities_equal_those_of_the_logits(kind):
    """Against log_softmax of the model's own logits, per token; and the gradient of their sum."""
    from trl.trainer.utils import add_fused_lm_head

    from utils.model.head import check_head, head_difference

    model = small(kind).eval()
    ids = torch.arange(5, 25)[None]
    expected = model(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    expected.sum().backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    assert (head_difference(model) is None) == (kind == "qwen2")  # what TRL's head does by itself
    check_head(model)
    found = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    found.sum().backward()
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(weight.grad, gradients[name], rtol=1e-3, atol=1e-3, msg=name)
