"""Solutions of the exercises of dpo.ipynb."""

import torch
from torch.nn import functional as F


# exercise 1
def robust_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, flipped=0.1):
    h = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    right, wrong = -F.logsigmoid(beta * h), -F.logsigmoid(-beta * h)
    # L(h) = ((1 − ε) ℓ(h) − ε ℓ(−h)) / (1 − 2ε): in the mean over flips ℓ(−h) cancels
    return ((1 - flipped) * right - flipped * wrong) / (1 - 2 * flipped)


# exercise 2
def simpo_loss(policy_chosen, policy_rejected, chosen_length, rejected_length, beta, gamma):
    # r = β/|y| · log π(y|x)
    chosen, rejected = beta * policy_chosen / chosen_length, beta * policy_rejected / rejected_length
    # L = −log σ(r_w − r_l − γ)
    return -F.logsigmoid(chosen - rejected - gamma)


# exercise 3
def ranking_loss(policy, reference, beta):
    rewards = beta * (policy - reference)
    # log Σ_{j ≥ k} exp(r̂_j): a running log-sum-exp from the last answer to the first
    remaining = torch.logcumsumexp(rewards.flip(1), dim=1).flip(1)
    # L = Σ_k (log Σ_{j ≥ k} exp(r̂_j) − r̂_k)
    return (remaining - rewards).sum(dim=1)
