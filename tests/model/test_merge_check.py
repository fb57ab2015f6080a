"""The comparison of logits before and after a merge."""

import pytest
import torch

from utils.model import merge_check


@pytest.mark.parametrize("dtype", merge_check.TOLERANCE)
def test_a_merge_that_loses_the_adapter_is_refused(dtype):
    torch.manual_seed(0)
    base, noise = torch.randn(2, 3, 8, 50)
    for size in (0.03, 5e-4):
        adapter = base + size * noise
        with pytest.raises(merge_check.MergeDiffers, match="100 % of what the adapter changes"):
            merge_check.refuse_difference(merge_check.compare(base, adapter, base), dtype, "it", "a")
        merge_check.refuse_difference(merge_check.compare(base, adapter, adapter + 1e-6 * base), dtype, "it", "a")
