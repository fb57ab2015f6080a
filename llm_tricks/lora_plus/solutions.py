"""Solutions of the exercises of lora_plus.ipynb."""


# exercise 1
def sgd_parts(a, b, x, y, rate_a, rate_b):
    # U = f(x) − y,  ∂L/∂a = U b x,  ∂L/∂b = U aᵀx
    error = b * (a @ x) - y
    move_a, move_b = -rate_a * error * b * x, -rate_b * error * (a @ x)
    # δ1 = b (δaᵀx) = −η_a b² U |x|²,  δ2 = δb (aᵀx) = −η_b (aᵀx)² U,  δ3 = δb (δaᵀx)
    return b * (move_a @ x), move_b * (a @ x), move_b * (move_a @ x)


# exercise 2
def other_start(a, b):
    # B starts at n⁰ and its steps add n^b;  A x starts at 0
    B, z = max(0, b), a + 1
    # with a = b = −1/2 the part of A grows like √n: one rate must fall like 1/n, and then the part of B vanishes
    return {"B": B, "A x": z, "B δA x": B + (a + 1), "δB A x": b + z}


# exercise 3
def patient_groups(model, lr, ratio):
    groups = {rate: {"params": [], "lr": rate, "weight_decay": 0.0} for rate in (lr, lr * ratio, 1e-6)}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            rate = 1e-6 if "lora_embedding_" in name else lr * ratio if "lora_B" in name else lr
            groups[rate]["params"].append(weight)
    return list(groups.values())
