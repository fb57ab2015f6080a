"""What proofs found, by name."""

IN_PROCESS = ["padding_free", "packed", "accumulation", "adapter_off", "merged", "stops"]


def holding(proofs: dict) -> dict:
    return {name: proof["holds"] for name, proof in proofs.items()}
