"""Solutions of the exercises of packing.ipynb."""

import torch


# exercise 1
def boundaries(positions):
    # an example begins where p = 0; the last one ends with the row
    starts = (positions == 0).nonzero().flatten()
    ends = torch.cat([starts, torch.tensor([len(positions)])]).to(torch.int32)
    return ends, int(ends.diff().max())


# exercise 2
def loss_per_row(losses, labels, positions):
    # ℓ_t predicts token t + 1, and belongs to the example of that token
    trained = labels[1:] != -100
    example = (positions == 0).cumsum(dim=0)[1:] - 1
    # n_i, and Σ_t ℓ of each example
    counts = torch.zeros(int(example[-1]) + 1).index_add(0, example, trained.float())
    sums = torch.zeros_like(counts).index_add(0, example, losses * trained)
    # 1/R · Σ_i (Σ_t ℓ) / n_i, over the R examples that are trained
    return (sums[counts > 0] / counts[counts > 0]).mean()


# exercise 3
def steps_within(lengths, budget):
    steps = []
    for row in (-lengths).argsort(kind="stable").tolist():
        # the first row of a step is its longest: (rows + 1) · max L ≤ budget
        if steps and (len(steps[-1]) + 1) * lengths[steps[-1][0]] <= budget:
            steps[-1].append(row)
        else:
            steps.append([row])
    return steps
