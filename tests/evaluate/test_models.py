"""The models that are evaluated: a base without a chat format is compared in that of the trained model."""

from utils.evaluate.models import check_eval_models, load_eval_models
from utils.script import evaluate


def test_a_base_without_a_format_has_the_stop_token_of_the_trained_model(trained):
    args = evaluate.EvaluateArgs(model_path=str(trained()))
    models, problems = check_eval_models(args, compare_base=True, insist=True)
    assert not problems
    for eval_model in load_eval_models(args, models):
        stop = eval_model.tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert eval_model.tokenizer.eos_token_id == stop
        assert stop in eval_model.load().generation_config.eos_token_id
