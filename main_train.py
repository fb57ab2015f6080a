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
    from utils.model.layout import resolve_padding_free
    from utils.model.load import load_model
    from utils.model.tokenizer import load_run_tokenizer
    from utils.run.save import begin_run, finish_run, open_run_folder, save_history_on_exit
    from utils.run.summary import print_summary
    from utils.tasks import get_task
    from utils.template import get_run_template
    from utils.train.resume import check_resume
    from utils.train.trainer import prepare_trainer, raise_if_stopped

    set_seed(train_args.seed)
    task = get_task(args.task_type)

    # ------------------------------------------------------------------ template and tokenizer
    tokenizer = load_run_tokenizer(args)
    template = get_run_template(args, tokenizer) if task.uses_template else None

    # ------------------------------------------------------------------ datasets
    data = task.load_datasets(args, train_args, template, tokenizer)
    check_resume(args, train_args, data)
    examine(args, train_args, data, template, tokenizer)  # the doctor: its errors end the run here

    # ------------------------------------------------------------------ model
    model = load_model(args, train_args)
    resolve_padding_free(args, train_args, task, model, tokenizer)
    adapter = build_adapter(args, model, tokenizer, template)

    # ------------------------------------------------------------------ collator and trainer
    collator = task.build_collator(args, train_args, tokenizer)
    open_run_folder(args, train_args)
    trainer = task.build_trainer(args, train_args, model, adapter, data, collator, tokenizer)
    prepare_trainer(trainer, args, template, tokenizer)
    start = begin_run(trainer, args, train_args, data, tokenizer)

    # ------------------------------------------------------------------ train
    with save_history_on_exit(trainer):
        trainer.train(resume_from_checkpoint=train_args.resume_from_checkpoint)
        raise_if_stopped(trainer)

    # ------------------------------------------------------------------ save
    summary = finish_run(trainer, args, train_args, data, tokenizer, start)
    print_summary(summary)
    return summary


if __name__ == "__main__":
    run_command(main)
