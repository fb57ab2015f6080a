"""Fine-tunes a language model, from arguments to a saved model; each step is a call into its package.

python main_train.py
python main_train.py --model_name_or_path Qwen/Qwen1.5-7B --train_data_path my_rows.jsonl
"""

from utils.args import parse_args
from utils.runtime.command import run_command
from utils.runtime.log import setup_logging


def main(argv: list[str] | None = None) -> dict:
    # ------------------------------------------------------------------ arguments
    setup_logging()
    args, train_args = parse_args(argv)

    from transformers import set_seed

    from utils.doctor.examine import examine
    from utils.model.adapter import build_adapter
    from utils.model.layout import resolve_layout
    from utils.model.load import load_model
    from utils.model.tokenizer import tokenizer_of
    from utils.run.save import finish_run, keep_figures, note_start, open_run
    from utils.run.summary import print_summary
    from utils.tasks import get_task
    from utils.template import get_template
    from utils.train.resume import check_resume
    from utils.train.trainer import end_if_stopped, prepare_trainer

    set_seed(train_args.seed)
    task = get_task(args.task_type)

    # ------------------------------------------------------------------ template and tokenizer
    tokenizer = tokenizer_of(args)
    template = get_template(args.template_name, tokenizer, args.template_date) if task.uses_template else None

    # ------------------------------------------------------------------ datasets
    data = task.load_datasets(args, train_args, template, tokenizer)
    resumed = check_resume(args, train_args, data)
    examine(args, train_args, data, template, tokenizer)

    # ------------------------------------------------------------------ model
    model = load_model(args, train_args)
    resolve_layout(args, train_args, task, model, tokenizer)
    adapter = build_adapter(args, model, tokenizer, template)

    # ------------------------------------------------------------------ collator and trainer
    collator = task.build_collator(args, train_args, tokenizer)
    open_run(train_args, args)
    trainer = task.build_trainer(args, train_args, model, adapter, data, collator, tokenizer)
    prepare_trainer(trainer, tokenizer, template, args)
    start = note_start(trainer, args, train_args, data, tokenizer, resumed)

    # ------------------------------------------------------------------ train
    with keep_figures(trainer):
        trainer.train(resume_from_checkpoint=train_args.resume_from_checkpoint)
        end_if_stopped(trainer)

    # ------------------------------------------------------------------ save
    summary = finish_run(trainer, args, train_args, data, tokenizer, start)
    print_summary(summary)
    return summary


if __name__ == "__main__":
    run_command(main)
