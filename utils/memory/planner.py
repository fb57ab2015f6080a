"""Estimates the memory of one GPU, with its parts, for the run that the flags describe."""

import dataclasses
from dataclasses import dataclass, field

from utils.config.deepspeed import short_name
from utils.memory.activations import Activations, step_bytes
from utils.memory.fake import Batch
from utils.memory.layout import Layout, layout_of
from utils.memory.states import States, model_states
from utils.model.adapter import ADAPTERS, FULL, adapter_of
from utils.model.layout import expected_layout
from utils.model.meta import meta_model
from utils.model.options import compute_dtype, uses_checkpointing
from utils.model.rope import load_scaled_config
from utils.runtime.errors import UserError, first_line


def modes() -> dict[str, tuple[str, bool]]:
    """Name of a training mode in a plan → its `--train_mode` and `--use_dora`: `{"dora": ("lora", True)}`."""
    found = {}
    for name, row in ADAPTERS.items():
        found[name] = (name, False)
        if row.with_dora:
            found[row.with_dora] = (name, True)
    return found


@dataclass(frozen=True)
class Setting:
    """A training mode, a DeepSpeed layout, and whether gradient checkpointing is on.

    Attributes:
        mode: a name of `modes()`: full, lora, dora, qlora, `qlora with dora`.
        layout: none, or a name of `--deepspeed`.
        checkpointing: whether activations are recomputed in the backward pass.
    """

    mode: str
    layout: str
    checkpointing: bool


@dataclass(frozen=True)
class Estimate:
    """Bytes of one GPU at the peak of a step, by purpose.

    Attributes:
        parameters, gradients, optimizer: exact, of the GPU that holds most.
        activations: saved by the forward pass for the backward pass.
        logits: of the language-model head and the loss.
        buffers: temporary: of a layer while it is computed, and DeepSpeed's and DDP's communication buffers.
        overlap: what is freed before the rest is allocated, so that the parts do not add up.
        host: bytes of offloaded CPU memory for each GPU.
        words: name of a part → how it was computed, as text.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    buffers: int
    overlap: int = 0
    host: int = 0
    words: dict = field(default_factory=dict, compare=False)

    @property
    def total(self) -> int:
        parts = self.parameters + self.gradients + self.optimizer + self.activations + self.logits + self.buffers
        return parts - self.overlap


def setting_of(args, train_args, weights: int) -> Setting:
    """The setting that the flags themselves describe."""
    mode = (args.use_dora and adapter_of(args).with_dora) or args.train_mode
    return Setting(mode, short_name(train_args.deepspeed) or "none", uses_checkpointing(train_args, weights))


def batch_of(args, train_args, on_gpu: bool = True, whole_logits: bool = False) -> Batch:
    """The largest batch of a run: every row has `max_len` tokens, all of them trained."""
    task = args.task
    return Batch(
        rows=train_args.per_device_train_batch_size * len(task.row_type.sequence_columns),
        tokens=args.max_len,
        end_to_end=_lays_end_to_end(args, train_args),
        on_gpu=on_gpu,
        whole_logits=whole_logits,
    )


def _lays_end_to_end(args, train_args) -> bool:
    """Whether the run lays its rows end to end, by the same probe of a small model as `utils.script.explain`."""
    if not args.task.lays_end_to_end(train_args):
        return False
    problem, chosen, _ = expected_layout(args, train_args, args.task, _any_tokenizer())
    return chosen or problem is not None  # a model that the run would refuse is planned as the flags set it


def _any_tokenizer():
    """A tokenizer of 512 words: the probe's rows are arbitrary ids, and beside a config.json there may be none."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({str(number): number for number in range(512)}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1")


class Planner:
    """Estimates many settings of one run; what they have in common is computed once.

    Args:
        args: CommonArgs, as parsed.
        train_args: the recipe's TrainArgument.
        processes: GPUs.
        batch: the rows of a step; by default the largest batch, on a GPU.

    Raises:
        UserError: config.json is missing, or describes no model.
    """

    def __init__(self, args, train_args, processes: int, batch: Batch | None = None):
        self.args, self.train_args, self.processes = args, train_args, processes
        self.batch = batch or batch_of(args, train_args)
        self.config = load_scaled_config(args.model_name_or_path, args.rope_scaling, args.trust_remote_code)
        self._models: dict = {}
        self._steps: dict = {}
        self.weights = sum(weight.numel() for weight in self._model(self._args_of(FULL), False).parameters())

    def own(self) -> Setting:
        """The setting that the flags themselves describe."""
        return setting_of(self.args, self.train_args, self.weights)

    def estimate(self, setting: Setting) -> Estimate:
        """The memory of one setting.

        Raises:
            UserError: the model's own code, or the optimizer's, does not run without weights.
        """
        try:
            return self._estimate(setting)
        except UserError:
            raise
        except Exception as error:  # each model's code raises its own
            raise UserError(
                f"--model_name_or_path {self.args.model_name_or_path!r} cannot be planned with --train_mode "
                f"{setting.mode}: its code does not run without weights ({first_line(error)})"
            ) from error

    def _estimate(self, setting: Setting) -> Estimate:
        args, layout = self._args_of(setting.mode), layout_of(setting.layout, self.processes)
        size = compute_dtype(args).itemsize
        key = (setting.mode, layout.laid_out)
        if key not in self._models:
            # of the many models the first, which is the run's own, logs which parts are not trained
            self._models[key] = self._model(args, layout.laid_out, log=not self._models)
        model = self._models[key]
        states = model_states(args, self.train_args, model, layout, size)
        reference, reference_text = self._reference(args, model, layout, size)
        step = self._step(setting, args, layout)
        words = self._words(states, step, setting, reference_text)
        return _sum_up(states, step, reference, words, layout, self.train_args)

    def _args_of(self, mode: str):
        train_mode, dora = modes()[mode]
        args = dataclasses.replace(self.args, train_mode=train_mode, use_dora=dora)
        return adapter_of(args).without_foreign_flags(args)

    def _model(self, args, laid_out: bool, config=None, log: bool = False):
        return meta_model(args, self.train_args, laid_out, config or self.config, log)

    def _step(self, setting: Setting, args, layout: Layout) -> Activations:
        # how ZeRO shards the weights does not change what a layer computes
        laid_out = layout.laid_out and args.precision != "fp32"
        key = (setting.mode, setting.checkpointing, laid_out)
        if key not in self._steps:
            self._steps[key] = step_bytes(
                args,
                self.train_args,
                lambda config: self._model(args, laid_out, config),
                self.config,
                self.batch,
                laid_out,
                setting.checkpointing,
            )
        return self._steps[key]

    def _reference(self, args, model, layout: Layout, size: int) -> tuple[int, str]:
        """Bytes of the frozen copy that computes the reference's log-probabilities, and how they were computed."""
        if not args.task.needs_reference or getattr(self.train_args, "precompute_ref_log_probs", False):
            return 0, ""
        if adapter_of(args).is_adapter and not args.adapter_name_or_path:
            return 0, ""  # the same model with the adapter off
        trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        itemsize = size if layout.laid_out else 4
        split = self.processes if layout.stage == 3 else 1
        text = f" + the reference: {trained:,} × {itemsize} B" + f" / {split}" * (split > 1)
        return trained * itemsize // split, text

    def _words(self, states: States, step: Activations, setting: Setting, reference: str) -> dict:
        batch = self.batch
        checkpointing = "with" if setting.checkpointing else "without"
        return {
            **states.words,
            "parameters": states.words["parameters"] + reference,
            "activations": f"{batch}, {checkpointing} gradient checkpointing",
            "logits": f"{batch.labelled:,} trained positions × {self.config.get_text_config().vocab_size:,} tokens, "
            + ("whole, in float32" if batch.whole_logits else "in tiles"),
            "buffers": "; ".join(filter(None, ["a layer while it is computed", states.words.get("buffers")])),
        }


def _sum_up(states, step, reference: int, words: dict, layout: Layout, train_args) -> Estimate:
    buffers = step.temporary + states.buffers
    overlap = 0
    temporary = step.saved + step.logits + buffers
    if layout.laid_out:
        # the optimizer steps when activations and buffers are freed
        buffers += max(0, states.step - temporary)
    elif train_args.gradient_accumulation_steps == 1:
        worst = max(step.early, step.late, step.peak)
        overlap = max(0, states.gradients + step.peak - worst)
    return Estimate(
        parameters=states.parameters + reference,
        gradients=states.gradients,
        optimizer=states.optimizer,
        activations=step.saved,
        logits=step.logits,
        buffers=buffers,
        overlap=overlap,
        host=states.host,
        words=words,
    )


def estimate(args, train_args, processes: int, on_gpu: bool = True) -> Estimate:
    """The memory of each GPU of a run, from config.json alone.

    Args:
        args: CommonArgs, as parsed.
        train_args: the recipe's TrainArgument; its `deepspeed` decides what is sharded.
        processes: GPUs.
        on_gpu: assume a GPU's kernels, else this project's on the CPU.

    Returns:
        Estimate, in bytes.

    Raises:
        UserError: the model or the optimizer cannot be planned for.
    """
    planner = Planner(args, train_args, processes, batch_of(args, train_args, on_gpu))
    return planner.estimate(planner.own())
