"""Solutions of the exercises of moe.ipynb."""

import torch


# exercise 1
def chosen_again(clean, noisy, scale, k):
    largest = noisy.topk(k + 1).values
    # without expert i the k-th largest of the rest is the (k+1)-th of all if i is chosen, the k-th if it is not
    chosen = noisy >= largest[:, k - 1 : k]
    bar = torch.where(chosen, largest[:, k : k + 1], largest[:, k - 1 : k])
    # P = Φ((W_r x − bar) / softplus(W_n x))
    return torch.special.ndtr((clean - bar) / scale)


# exercise 2
def route_with_bias(logits, bias, k):
    p = logits.softmax(dim=-1)
    chosen = (p + bias).topk(k).indices
    weights = p.gather(1, chosen)
    return Routing(logits, weights / weights.sum(dim=-1, keepdim=True), chosen)  # noqa: F821 — the notebook's own class


def next_bias(bias, load, rate):
    # b += rate · sign(mean load − load)
    return bias + rate * (load.mean() - load).sign()


# exercise 3
def expert_choice(experts, x, logits, capacity):
    # each expert's column of p: its largest entries are the tokens it takes
    weights, tokens = logits.softmax(dim=-1).topk(capacity, dim=0)
    y = torch.zeros_like(x)
    for number in range(logits.shape[-1]):
        mine = tokens[:, number]
        # y[token] += p_i · expert_i(x[token])
        y = y.index_add(0, mine, weights[:, number, None] * experts(number, x[mine]))
    return y
