"""Solutions of the exercises of deepspeed_zero.ipynb."""

import torch
import torch.distributed as dist


# exercise 1
def clip(parts, max_norm):
    # ‖g‖² = Σ over ranks of Σ over parts of ‖g_part‖²; the padding is zero and adds nothing
    total = sum(part.square().sum() for part in parts)
    dist.all_reduce(total)
    # g ← g · min(1, max / (‖g‖ + 1e-6))
    factor = (max_norm / (total.sqrt() + 1e-6)).clamp(max=1)
    for part in parts:
        part.mul_(factor)


# exercise 2
def reshard(parts, size, ranks):
    whole = torch.cat(parts)[:size]
    # length = ⌈size / M⌉ · M
    length = -(-size // ranks) * ranks
    return list(torch.nn.functional.pad(whole, (0, length - size)).chunk(ranks))


# exercise 3
def sent_per_weight(stage, ranks, parts):
    # stages 0 and 1 add up the gradients at home and send once: all-reduce, or reduce-scatter + all-gather
    # stage 2 sends each backward's gradients, and the weights once; stage 3 all three collectives each time
    rounds = {0: 2, 1: 2, 2: parts + 1, 3: 3 * parts}[stage]
    return rounds * 2 * (ranks - 1) / ranks
