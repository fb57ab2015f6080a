"""Names of other libraries that are private or replaced here: they exist, have the expected form, give equal results.

A new version of a library that breaks one of them fails here, by name, before a training goes wrong. A test that begins
with `test_still_needed` fails once the library does without the workaround, which can then go.
"""

import ast
import importlib
import inspect
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

# ------------------------------------------------------------------ names and signatures

# name → its parameters; None for what is not called. Where the code uses it: git grep the last part
NAMES = {
    # utils/patches/lm_head.py, utils/memory/fake.py
    "trl.trainer.utils._ChunkedLogProbFunction": None,
    "trl.kernels.ChunkedLogProbFunction.forward": "ctx hidden weight bias targets temperature chunk_size "
    "final_logit_softcapping logit_scale outputs",
    "trl.trainer.utils._use_triton": "device",
    "trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE": None,
    "trl.kernels.chunked_logprob._forward_tile": "tile tile_stride targets running_max sum_exp x_sum_exp sq_sum_exp "
    "z_sum max_before_target target_logit vocab_start n_cols logit_scale softcap inv_t HAS_SOFTCAP HAS_ENTROPY "
    "HAS_LOG_SUM_SQ_PROBS HAS_MEAN_LOGITS HAS_IS_TOP1 BLOCK_SIZE",
    "trl.kernels.chunked_logprob._backward_tile": "tile tile_stride targets log_z entropy grad_logprobs grad_entropy "
    "vocab_start n_cols logit_scale softcap inv_t HAS_SOFTCAP HAS_LOGPROB_GRAD HAS_ENTROPY_GRAD BLOCK_SIZE",
    "trl.kernels.chunked_logprob._addmm_fp32": "acc a b",
    # utils/tasks
    "trl.DPOTrainer._prepare_dataset": "self dataset processing_class args dataset_name",
    "trl.DPOTrainer._precompute_ref_logps": "self dataset name batch_size",
    "trl.DPOTrainer._compute_loss": "self model inputs return_outputs",
    "trl.DPOTrainer.compute_ref_log_probs": "self model inputs",
    # utils/patches/layers.py, utils/patches/lazy_imports.py, utils/model, utils/memory
    "peft.tuners.tuners_utils.BaseTunerLayer._cast_input_dtype": "self x dtype",
    "peft.tuners.tuners_utils._check_lora_target_modules_mamba": "peft_config model target_name",
    "peft.tuners.lora.dora.dequantize_module_weight": "module",
    "peft.import_utils.is_bnb_available": "",
    "peft.tuners.lora.model.is_bnb_available": "",
    "peft.tuners.lora.model.is_bnb_4bit_available": "",
    "peft.PeftModel.create_or_update_model_card": "self output_dir",
    "accelerate.utils.other.is_deepspeed_available": "",
    "transformers.utils.import_utils.is_bitsandbytes_available": "min_version",
    # utils/patches/attention.py, utils/memory/fake.py
    "transformers.integrations.sdpa_attention.sdpa_attention_forward": "module query key value attention_mask dropout "
    "scaling is_causal position_bias cache kwargs",
    "transformers.AttentionInterface._global_mapping": None,
    "transformers.masking_utils.find_packed_sequence_indices": "position_ids",
    "transformers.integrations.moe._can_use_grouped_mm": "input weight offs",
    # utils/model/gguf_file.py
    "transformers.integrations.gguf.reader._mapped": "gguf_path",
    "transformers.integrations.gguf.reader._read_metadata": "blob gguf_path string_arrays",
    "transformers.integrations.gguf.reader._read_tensor_table": "blob tensor_count pos",
    # utils/train, utils/tasks: methods of transformers' Trainer that a mix-in overrides or calls
    "transformers.Trainer._run_epoch": "self model epoch train_dataloader steps_in_epoch num_update_steps_per_epoch "
    "trial ignore_keys_for_eval start_time resume_from_checkpoint epochs_trained steps_trained_in_current_epoch",
    "transformers.Trainer._save_checkpoint": "self model trial",
    "transformers.Trainer._save": "self output_dir state_dict",
    "transformers.Trainer._determine_best_metric": "self metrics trial",
    "transformers.Trainer._get_grad_norm": "self model grad_norm",
    "transformers.Trainer._init_training_state": "self max_steps num_update_steps_per_epoch num_train_epochs "
    "resume_from_checkpoint trial",
    "transformers.Trainer._load_optimizer_and_scheduler": "self checkpoint",
    "transformers.Trainer._get_num_items_in_batch": "self batch_samples device",
    "transformers.Trainer._get_train_sampler": "self train_dataset",
    "transformers.Trainer._get_eval_sampler": "self eval_dataset",
    "transformers.Trainer._get_dataloader": "self dataset description batch_size sampler_fn is_training dataloader_key",
    "transformers.Trainer._prepare_inputs": "self inputs",
    "transformers.Trainer.training_step": "self model inputs num_items_in_batch",
    "transformers.Trainer.prediction_step": "self model inputs prediction_loss_only ignore_keys",
    "transformers.Trainer.evaluation_loop": "self dataloader description prediction_loss_only ignore_keys "
    "metric_key_prefix",
    "transformers.Trainer.get_batch_samples": "self epoch_iterator num_batches device",
    "transformers.Trainer.get_decay_parameter_names": "self model",
    "transformers.Trainer.create_model_card": "self language license tags model_name finetuned_from tasks dataset_tags "
    "dataset dataset_args",
    # utils/model/load.py, generation_config.py, meta.py; utils/template/dates.py
    "transformers.PreTrainedModel._can_set_attn_implementation": "",
    "transformers.PreTrainedModel._supports_flash_attn": None,
    "transformers.PreTrainedModel._compatible_flash_implementations": None,
    "transformers.PreTrainedConfig._attn_implementation": None,
    "transformers.GenerationConfig._get_default_generation_params": "",
    "transformers.integrations.bitsandbytes.replace_with_bnb_linear": "model modules_to_not_convert "
    "quantization_config pre_quantized",
    "transformers.utils.chat_template_utils.datetime": None,
    "torch.ops.mkldnn._is_mkldnn_bf16_supported": None,
    # utils/train/trainer.py, utils/storage/pickles.py
    "torch.save": "obj f pickle_module pickle_protocol _use_new_zipfile_serialization _disable_byteorder_record",
    "torch.serialization.get_unsafe_globals_in_checkpoint": "f",
    "deepspeed.DeepSpeedEngine._copy_recovery_script": "self save_path",
    "deepspeed.DeepSpeedEngine.save_checkpoint": "self save_dir tag client_state save_latest exclude_frozen_parameters",
    "deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine.TorchCheckpointEngine.load": "self path map_location",
}  # fmt: skip
# attributes of instances, each with something that has it; tested below or by the trainings of other tests
OF_INSTANCES = {
    "_metrics": "TRL's trainers: figures by mode and name",
    "_total_train_tokens": "TRL's trainers: tokens seen",
    "_fingerprint": "datasets.Dataset",
    "_weight_conversions": "transformers' models: how saved names were changed",
    "_last_lr": "torch's schedulers",
    "_train_batch_size": "transformers' Trainer",
    "_n_gpu": "TrainingArguments",
    "_parameters": "torch.nn.Module",
    "_buffers": "torch.nn.Module",
    "_cdata": "torch's storages",
    "_actions": "argparse.ArgumentParser",
    "_action_groups": "argparse.ArgumentParser",
}
PUBLIC = {"_replace", "_asdict", "_exit"}  # documented, in spite of the underscore: of named tuples, of os


def resolve(name: str):
    """`"torch.nn.Linear"` → the class."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise ImportError(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_exists_with_the_expected_parameters(name):
    found = resolve(name)
    if NAMES[name] is not None:
        assert list(inspect.signature(found).parameters) == NAMES[name].split()


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("transformers.Trainer._")])
def test_transformers_calls_the_trainer_s_method(name):
    """An override that nothing calls any more would do nothing, without an error."""
    import transformers.trainer

    assert f"self.{name.rpartition('.')[2]}" in inspect.getsource(transformers.trainer)


def private_names() -> dict[str, str]:
    """Private names that utils/ reads of other libraries' objects, by their last part → where."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "utils").rglob("*.py")}
    own, found = set(), {}
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                of_self = isinstance(node, ast.Name) or getattr(node.value, "id", None) == "self"
                own |= {getattr(node, "id", None) or node.attr} if of_self else set()
    own -= {name for name in own if name in OF_INSTANCES}
    for path, tree in trees.items():
        for node in ast.walk(tree):
            of_super = isinstance(node, ast.Attribute) and ast.unparse(node.value).startswith("super(")
            names = [node.attr] if isinstance(node, ast.Attribute) and (of_super or node.attr not in own) else []
            if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("utils"):
                names += [alias.name for alias in node.names]
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            found |= {name: where for name in names if name.startswith("_") and not name.startswith("__")}
    return found


def test_every_private_name_is_listed_here():
    listed = {name.rpartition(".")[2] for name in NAMES} | OF_INSTANCES.keys() | PUBLIC
    assert {name: where for name, where in private_names().items() if name not in listed} == {}


def test_every_replaced_name_is_listed_here():
    """`patch("module.name", …)` and `patch.object(owner, "name", …)`."""
    listed = {name.rpartition(".")[2] for name in NAMES} | {"_score", "gather", "getattr"}
    for path in (ROOT / "utils").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("patch", "patch.object"):
                texts = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
                assert {text.rpartition(".")[2] for text in texts} <= listed, f"{path}:{node.lineno}"


def test_attributes_of_instances():
    import argparse

    from datasets import Dataset
    from transformers import TrainingArguments

    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert scheduler._last_lr == [0.5]
    assert isinstance(Dataset.from_dict({"a": [1]})._fingerprint, str)
    assert set(layer._parameters) == {"weight", "bias"} and layer._buffers == {}
    assert layer.weight.untyped_storage()._cdata == layer.weight.detach().untyped_storage()._cdata
    parser = argparse.ArgumentParser()
    parser.add_argument_group("a").add_argument("--x")
    assert parser._actions[-1].dest == "x" and parser._action_groups[-1].title == "a"
    assert "self._n_gpu" in inspect.getsource(TrainingArguments)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("self._metrics", "trl.trainer.dpo_trainer"),
        ("self._metrics", "trl.trainer.sft_trainer"),
        ("self._total_train_tokens", "trl.trainer.sft_trainer"),
        ("self._train_batch_size", "transformers.trainer"),
        ("_weight_conversions", "transformers.core_model_loading"),
    ],
)
def test_attributes_of_trainers_and_models(name, module):
    """Set when a trainer or a model is made, as other tests do; here only that the library still has them."""
    assert name in inspect.getsource(resolve(module))


# ------------------------------------------------------------------ equal results


def in_new_process(code: str) -> dict:
    """Runs code in a process that has imported nothing yet; returns what it kept in `found`, as JSON keeps it."""
    code = f"import json, sys\nfound = {{}}\n{code}\nprint(json.dumps(found))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def without_patches(tmp_path_factory) -> dict:
    """What the libraries do by themselves."""
    state = str(tmp_path_factory.mktemp("state") / "state.pt")
    return in_new_process(
        "import torch\nfrom accelerate.utils import extract_model_from_parallel\n"
        "found['deepspeed'] = ['deepspeed' in sys.modules]\n"
        "extract_model_from_parallel(torch.nn.Linear(1, 1))\nfound['deepspeed'].append('deepspeed' in sys.modules)\n"
        # DeepSpeed's load, then the one that reads as much without running code
        "from deepspeed.runtime.checkpoint_engine import torch_checkpoint_engine as engines\n"
        "engine = engines.TorchCheckpointEngine.__new__(engines.TorchCheckpointEngine)\n"
        f"path, state = {state!r}, {{'module': torch.arange(3.0), 'step': 7, 'names': ['a']}}\n"
        "torch.save(state, path)\ntheirs = engine.load(path)\n"
        "from utils.storage.pickles import use_safe_deepspeed_load\nuse_safe_deepspeed_load()\n"
        "ours = engine.load(path, 'cpu')\n"
        "found['state'] = [ours['module'].equal(theirs['module']), ours['step'], ours['names'], "
        "ours.keys() == theirs.keys()]\n"
        "found['bitsandbytes'] = ['bitsandbytes' in sys.modules]\nimport peft\n"
        "found['bitsandbytes'].append('bitsandbytes' in sys.modules)\n"
        "from peft.tuners.tuners_utils import BaseTunerLayer as layer\n"
        "found['casts'] = [str(layer._cast_input_dtype(None, x, t).dtype) for x in (torch.zeros(1), "
        "torch.zeros(1).bfloat16()) for t in (torch.float32, torch.bfloat16)]\n"
        "with torch.autocast('cpu', torch.bfloat16):\n"
        "    cast = layer._cast_input_dtype(None, torch.zeros(1).bfloat16(), torch.float32)\n"
        "found['cast under autocast'] = str(cast.dtype)"
    )


@pytest.fixture(scope="module")
def with_patches() -> dict:
    """What they do with the patches of their imports."""
    return in_new_process(
        "import torch\nfrom utils.patches.lazy_imports import import_peft, skip_deepspeed_import\n"
        "skip_deepspeed_import()\nfrom accelerate.utils import extract_model_from_parallel\n"
        "model = torch.nn.Linear(1, 1)\n"
        "found['unwrapped'] = [extract_model_from_parallel(model) is model, 'deepspeed' in sys.modules]\n"
        "import_peft()\n"
        "import peft.import_utils, peft.tuners.lora.model as lora\nfrom transformers.utils import import_utils\n"
        "found['before'] = ['bitsandbytes' in sys.modules, lora.is_bnb_available()]\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "sizes = ('vocab_size', 'hidden_size', 'intermediate_size')\n"
        "tiny = LlamaConfig(**dict.fromkeys(sizes, 8), num_hidden_layers=1, num_attention_heads=1)\n"
        "config = peft.LoraConfig(task_type='CAUSAL_LM', target_modules=['q_proj'])\n"
        "peft.get_peft_model(LlamaForCausalLM(tiny), config)\n"
        "found['with an adapter'] = 'bitsandbytes' in sys.modules\n"
        "found['package'] = [peft.import_utils.is_bnb_available(), import_utils.is_bitsandbytes_available()]\n"
        "import bitsandbytes\n"
        "found['after'] = [lora.is_bnb_available(), lora.is_bnb_4bit_available()]"
    )


def test_the_head_equals_trl_s():
    """Frozen, so computed here: the same log-probabilities, entropies, top tokens and gradient."""
    from trl.kernels import ChunkedLogProbFunction

    from utils.patches.lm_head import _apply

    torch.manual_seed(0)
    weight, targets = torch.randn(50, 8), torch.randint(0, 50, (9,))
    outputs = ("log_probs", "entropy", "is_top1")
    found = []
    for function in (ChunkedLogProbFunction.apply, lambda *given: _apply(None, *given)):
        hidden = torch.randn(9, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        log_probs, entropy, *_, is_top1 = function(hidden, weight, None, targets, 1.0, 16, None, 1.0, outputs)
        log_probs.sum().backward()
        found.append((log_probs, entropy, is_top1, hidden.grad))
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change", [{"temperature": 2.0}, {"softcap": 30.0}, {"scale": 0.5}, {"trained": True}, {"bias": True}]
)
def test_a_head_of_another_form_goes_to_trl(change):
    from utils.patches.lm_head import _apply

    weight = torch.randn(5, 4, requires_grad="trained" in change)
    bias = torch.zeros(5) if "bias" in change else None
    given = (torch.randn(2, 4), weight, bias, torch.tensor([0, 1]), change.get("temperature", 1.0), 8,
             change.get("softcap"), change.get("scale", 1.0), ("log_probs",))  # fmt: skip
    assert _apply(lambda *passed: passed, *given) == given


def test_trl_asks_for_triton_only_to_leave_out_positions():
    """`_use_triton` is replaced in one module, which asks once."""
    import trl.trainer.utils

    assert inspect.getsource(trl.trainer.utils).count("_use_triton(") == 1


def test_attention_of_one_row_equals_transformers():
    """Without blocks, with them and with a bias on the scores."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from utils.patches.attention import use_row_attention

    use_row_attention()
    ours = AttentionInterface._global_mapping["sdpa"]
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, 1
    query, key, value = torch.randn(3, 1, 2, 5, 4)
    rows = torch.tensor([0, 0, 1, 1, 1])
    mask = torch.ones(5, 5, dtype=torch.bool).tril() & (rows[:, None] == rows)
    for given in (None, mask[None, None], torch.zeros(1, 1, 5, 5).masked_fill(~mask, -1e9)):
        theirs = sdpa_attention_forward(module, query, key, value, given)[0]
        torch.testing.assert_close(ours(module, query, key, value, given)[0], theirs)


def test_an_adapter_s_input_is_cast_as_peft_does(without_patches):
    from peft.tuners.tuners_utils import BaseTunerLayer

    from utils.patches.layers import leave_casts_to_autocast

    leave_casts_to_autocast()
    kinds = (torch.float32, torch.bfloat16)
    cast = BaseTunerLayer._cast_input_dtype
    ours = [str(cast(None, torch.zeros(1, dtype=kind), to).dtype) for kind in kinds for to in kinds]
    assert ours == without_patches["casts"]
    assert cast(None, None, torch.float32) is None
    with torch.autocast("cpu", torch.bfloat16):  # which casts by itself
        x = torch.zeros(1, 2, dtype=torch.bfloat16)
        assert cast(None, x, torch.float32) is x
        layer = torch.nn.Linear(2, 2)
        assert torch.equal(layer(x), layer(x.float()))


def test_only_arrow_casts_by_itself():
    """A subclass with a method of its own does not see the replaced one."""
    import peft.tuners.lora
    from peft.tuners.lora import arrow
    from peft.tuners.tuners_utils import BaseTunerLayer

    def below(kind):
        return {kind, *(found for sub in kind.__subclasses__() for found in below(sub))}

    others = {kind for kind in below(BaseTunerLayer) - {BaseTunerLayer} if "_cast_input_dtype" in vars(kind)}
    assert {kind.__module__ for kind in others} <= {arrow.__name__} and peft.tuners.lora.LoraLayer not in others


def test_peft_knows_of_bitsandbytes_as_before(with_patches):
    """Imported without it, PEFT and transformers find the package, and layers of it once something imported it."""
    assert [with_patches[name] for name in ("before", "package", "after")] == [[False] * 2, [True] * 2, [True] * 2]


def test_an_adapter_is_added_without_bitsandbytes(with_patches):
    assert with_patches["with an adapter"] is False


def test_accelerate_unwraps_a_model_without_deepspeed(with_patches):
    assert with_patches["unwrapped"] == [True, False]


def test_a_deepspeed_state_is_read_as_by_deepspeed(without_patches):
    assert without_patches["state"] == [True, 7, ["a"], True]


def test_a_template_s_date_is_the_one_given():
    from transformers.utils import chat_template_utils

    from utils.template.dates import fixed_date

    theirs = chat_template_utils.datetime
    with fixed_date("2024-02-29"):
        assert chat_template_utils.datetime.now().strftime("%d %b %Y") == "29 Feb 2024"
    with fixed_date(""):
        assert chat_template_utils.datetime is theirs
    assert "datetime.now()" in inspect.getsource(chat_template_utils)


def test_the_noise_of_whole_rows_equals_transformers():
    """Rows of one length without padding: the one case in which transformers' NEFTune means the same."""
    from types import SimpleNamespace

    from transformers.integrations.neftune import neftune_post_forward_hook

    from utils.train.neftune import add_noise

    found = []
    for ours in (True, False):
        torch.manual_seed(0)
        layer = torch.nn.Embedding(9, 4).train()
        layer.get_input_embeddings = lambda layer=layer: layer
        if ours:
            add_noise(SimpleNamespace(neftune_noise_alpha=5.0, model=layer))
        else:
            layer.neftune_noise_alpha = 5.0
            layer.register_forward_hook(neftune_post_forward_hook)
        found.append(layer(torch.tensor([[1, 2, 3], [4, 5, 6]])))
    torch.testing.assert_close(*found)


# ------------------------------------------------------------------ what each workaround is still for


def test_still_needed_peft_imports_bitsandbytes(without_patches):
    assert without_patches["bitsandbytes"] == [False, True]


def test_still_needed_accelerate_imports_deepspeed(without_patches):
    assert without_patches["deepspeed"] == [False, True]


def test_still_needed_a_wrapped_head_has_no_bias():
    from peft.utils.other import TrainableTokensWrapper

    from utils.patches.layers import show_head_bias

    head = TrainableTokensWrapper(torch.nn.Linear(4, 8), "default", [1])
    with pytest.raises(AttributeError):
        _ = head.bias
    model = torch.nn.Module()
    model.get_output_embeddings = lambda: head
    show_head_bias(model)
    assert head.bias is head.original_module.bias


def test_still_needed_peft_casts_what_autocast_casts_back(without_patches):
    assert without_patches["cast under autocast"] == "torch.float32"
