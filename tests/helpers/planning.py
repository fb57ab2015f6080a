"""Arguments of a run whose memory is planned."""

from conftest import ROOT

from utils.args import parse_args


def parse_run(folder, *flags):
    run = ["--model_name_or_path", str(folder), "--output_dir", str(ROOT / "output" / "never"), *flags]
    return parse_args(run, needs_weights=False)


EXPERTS = {
    **dict.fromkeys(("mixtral", "gpt_oss"), {"num_local_experts": 4, "num_experts_per_tok": 2}),
    **dict.fromkeys(
        ("qwen2_moe", "qwen3_moe"),
        dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, shared_expert_intermediate_size=64),
    ),
}
