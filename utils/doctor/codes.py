"""The table of the doctor's codes, with severity, title and remedy in English and Chinese."""

from typing import NamedTuple

ERROR, WARNING, NOTE = "error", "warning", "note"


class Code(NamedTuple):
    """A row of the table.

    Attributes:
        severity: the usual one. An error makes the training wrong or stops it; a warning is likely not intended.
        quick: whether main_train.py checks for it too.
        title, title_zh: what is wrong.
        remedy, remedy_zh: what to do.
    """

    severity: str
    quick: bool
    title: str
    title_zh: str
    remedy: str
    remedy_zh: str


CODES = {
    # ------------------------------------------------------------------ arguments and settings
    "ARGUMENTS": Code(
        ERROR, False, "The arguments are refused", "参数被拒绝",
        "Correct the flag as the message says", "按提示修改参数",
    ),
    "DEEPSPEED_SHADOWS": Code(
        ERROR, True, "A key of the DeepSpeed file contradicts a flag", "DeepSpeed 配置与参数冲突",
        'Write "auto" for the key in the file, or remove the key', "把该键写成 \"auto\"，或删去",
    ),
    "FP16_MODEL_IS_BF16": Code(
        WARNING, True, "fp16 is used with a model that was trained in bf16", "用 fp16 训练 bf16 的模型",
        "Use --precision bf16 where the device has it, else fp32: values beyond 65,504 overflow in fp16",
        "设备支持时用 --precision bf16，否则用 fp32：超过 65504 的数值在 fp16 中会溢出",
    ),
    "LEARNING_RATE_UNUSUAL": Code(
        WARNING, True, "The learning rate is far from the usual range", "学习率远离常用范围",
        "Use a --learning_rate within the range", "把 --learning_rate 设在该范围内",
    ),
    "PASSES_MANY": Code(
        WARNING, True, "Many passes over the rows, with a model that needs few", "对不需要多轮训练的模型训练了很多轮",
        "Use --num_train_epochs 1 to 3; the recipe's default suits the embedded tiny model",
        "使用 --num_train_epochs 1 到 3；配方里的默认值是为内置的小模型设的",
    ),
    "WARMUP_TOO_LONG": Code(
        WARNING, True, "The warm-up takes half of the training or more", "预热占了训练的一半或更多",
        "Lower --warmup_steps (below 1 it is a share of all steps), or train longer",
        "减小 --warmup_steps（小于 1 时表示所占比例），或训练更久",
    ),
    "LAST_BATCH_SHORT": Code(
        WARNING, True, "Gradient accumulation leaves fewer rows for the last step of each epoch",
        "梯度累积使每轮最后一步的数据不足",
        "Choose --gradient_accumulation_steps so that it divides the batches of an epoch",
        "让 --gradient_accumulation_steps 整除每轮的批数",
    ),
    "LAYOUT_WRONG": Code(
        ERROR, False, "The model computes the rows of a batch differently from single rows",
        "模型在一批数据中的计算与单独计算每行不一致",
        "Follow the message: leave out --packing, use batches of one row, or choose another model",
        "按提示去掉 --packing、把批大小设为 1，或换一个模型",
    ),
    "ROWS_PADDED": Code(
        NOTE, False, "Rows are padded, though --padding_free is set", "虽然设置了 --padding_free，数据仍会被填充",
        "No action is needed: the model, or its eager attention, does not support rows laid end to end",
        "无需处理：该模型或其 eager 注意力不适合首尾相接的数据",
    ),
    "DISK_TOO_SMALL": Code(
        ERROR, True, "The disk has too little space for the checkpoints", "磁盘放不下将要写的检查点",
        "Free some space, lower --save_total_limit, use --save_only_model true, or another --output_dir",
        "腾出空间，减小 --save_total_limit，使用 --save_only_model true，或换 --output_dir",
    ),
    "MEMORY_TOO_SMALL": Code(
        ERROR, True, "The training does not fit in memory", "内存或显存不够",
        "Lower --per_device_train_batch_size or --max_len, use --gradient_checkpointing true, --train_mode "
        "qlora or --deepspeed zero3",
        "减小 --per_device_train_batch_size 或 --max_len，使用 --gradient_checkpointing true，或用 --train_mode qlora、"
        "--deepspeed zero3",
    ),
    "QLORA_LEAVES_WEIGHTS": Code(
        WARNING, True, "--train_mode qlora leaves many weights in 16 bits", "qlora 有许多权重仍是 16 位",
        "Count these bytes, as plan_memory does; --train_mode lora needs little more",
        "按这些字节估算显存（plan_memory 已计入）；--train_mode lora 也多不了多少",
    ),
    "MAX_LEN_OVER_POSITIONS": Code(
        WARNING, True, "Rows are longer than the model's maximum number of positions", "有的行比模型的位置数还长",
        "Lower --max_len to the model's max_position_embeddings, or extend its context with --rope_scaling",
        "把 --max_len 降到模型的 max_position_embeddings，或用 --rope_scaling 扩展上下文",
    ),
    # ------------------------------------------------------------------ template and tokens
    "TEMPLATE_TOKEN_SPLIT": Code(
        ERROR, True, "A special token of the template is not one token of the tokenizer",
        "模板的特殊符号不是单个 token",
        "Choose the --template_name made for this model, or auto", "选用适合该模型的 --template_name，或 auto",
    ),
    "TEMPLATE_DIFFERS": Code(
        WARNING, True, "The tokenizer's own chat template renders differently", "分词器自带的模板渲染结果不同",
        "Use --template_name auto, or the one made for this model; a base model can learn any of them",
        "使用 --template_name auto 或适合该模型的模板；基座模型可以教任何一种",
    ),
    "PROMPT_NOT_FOLLOWED": Code(
        WARNING, True, "The generation prompt ends differently from how trained answers begin",
        "生成提示的结尾与所训练回答的开头不一致",
        "Train answers that have thinking, or generate with a prompt that opens none (often "
        "enable_thinking=False)",
        "训练带思考的回答，或生成时用不开启思考的提示（多数模板：enable_thinking=False）",
    ),
    "PAD_IS_STOP": Code(
        NOTE, False, "The pad token is the stop token that is trained", "填充符就是要训练的停止符",
        "This project never trains padding, so nothing is lost; a program that masks labels by the pad token's id "
        "would lose the stop token: give the tokenizer a pad token of its own",
        "本项目从不训练填充，没有损失；按填充符 id 屏蔽标签的程序会丢掉停止符：给分词器单独的填充符",
    ),
    "BOS_DOUBLE": Code(
        ERROR, True, "Rows begin with two BOS tokens", "行首有两个起始符",
        "Remove the BOS token from the rows or from the chat template: the other, or the tokenizer, adds it already",
        "从数据或模板中去掉起始符：另一处或分词器已经加了",
    ),
    "BOS_MISSING": Code(
        WARNING, True, "The tokenizer adds a BOS token, and the rows do not begin with one",
        "分词器会加起始符，而行首没有",
        "Choose the --template_name made for this model, or auto", "选用适合该模型的 --template_name，或 auto",
    ),
    "STOP_NOT_TRAINED": Code(
        ERROR, True, "Answers do not end with a trained stop token", "回答末尾的停止符没有被训练",
        "Choose a template whose answers end with one special token; otherwise the model does not learn to stop",
        "选用回答以单个特殊符号结尾的模板；否则模型学不会停止",
    ),
    # ------------------------------------------------------------------ rows
    "ROW_UNREADABLE": Code(
        ERROR, False, "Rows cannot be read", "有的行无法读取",
        "Correct them, or use --on_bad_row drop", "修正它们，或使用 --on_bad_row drop",
    ),
    "ROW_NOTHING_TRAINED": Code(
        WARNING, False, "Rows have nothing to train and are dropped", "有的行没有可训练的内容，会被略去",
        "Add an answer, or remove the rows", "补上回答，或删去",
    ),
    "ROW_TOO_LONG": Code(
        WARNING, False, "Rows are too long and are dropped", "有的行太长，会被略去",
        "Raise --max_len (for pairs --max_prompt_length as well), or split the rows",
        "增大 --max_len（偏好对还有 --max_prompt_length），或把行拆短",
    ),
    "ROW_SHORTENED": Code(
        WARNING, False, "Rows are too long and lose their oldest turns or the beginning of their question",
        "有的行太长，会失去最早的轮次或问题的开头",
        "Raise --max_len (for pairs --max_prompt_length as well), or split the rows",
        "增大 --max_len（偏好对还有 --max_prompt_length），或把行拆短",
    ),
    "ANSWER_NOT_TRAINED": Code(
        WARNING, False, "Some answers of rows that are trained on are not trained",
        "参与训练的行里，有的回答本身不训练",
        "Remove marks that are not meant; fill or remove empty answers; raise --max_len for those that are cut off; if "
        "the template shows thinking only in the last turn, make a row of each turn, or use a template that keeps it",
        "去掉不该有的标记；补上或删去空回答；被截掉的，调大 --max_len；模板只在最后一轮显示思考时，把每轮拆成一行，"
        "或改用保留思考的模板",
    ),
    "FIELDS_UNREAD": Code(
        NOTE, False, "Rows have fields that are not read", "有的字段不会被读取",
        "No action is needed if they only describe the row; what should be trained belongs in the fields of a row "
        "format",
        "若只是描述信息，无须处理；要训练的内容须放进所用格式的字段",
    ),
    "DUPLICATE_ROWS": Code(
        WARNING, False, "Rows are repeated", "有重复的行",
        "Remove the repeats: a row that appears twice counts twice", "删去重复的行：出现两次就会算两次",
    ),
    "EVAL_IN_TRAIN": Code(
        WARNING, True, "Validation rows are in the training rows as well", "验证集的行也在训练集中",
        "Remove them from one of the two; otherwise the validation loss measures memorisation",
        "从其中一处删去，否则验证损失只反映背下来的内容",
    ),
    "PAIR_EQUAL": Code(
        WARNING, False, "Pairs have equal chosen and rejected answers and are dropped",
        "偏好对的两个回答相同，会被略去",
        "Remove them, or change one of the two answers", "删去，或换掉其中一个回答",
    ),
    "PAIR_LENGTH_BIAS": Code(
        WARNING, True, "One side of the pairs is nearly always the longer one", "偏好对的一侧几乎总是更长",
        "Balance the pairs, or use a loss that counts tokens (--loss_type sigmoid_norm, --ld_alpha): otherwise the "
        "model learns to prefer a length",
        "平衡长短，或使用按 token 计的损失（--loss_type sigmoid_norm、--ld_alpha）：否则模型学到的是长度",
    ),
    "SPECIAL_TOKEN_IN_CONTENT": Code(
        WARNING, False, "Rows contain the text of a special token", "内容里有特殊符号的文本",
        "Remove it (usually a chat template was applied before); see --allow_special_tokens_in_content",
        "删去，多半是已套过模板；参见 --allow_special_tokens_in_content",
    ),
    "UNICODE_BROKEN": Code(
        WARNING, False, "Rows contain broken Unicode", "有损坏的 Unicode 文本",
        "Read the source again with its own encoding, or remove the rows", "用正确的编码重新读取来源，或删去这些行",
    ),
    "INVISIBLE_CHARACTERS": Code(
        WARNING, False, "Rows contain invisible characters", "有不可见字符",
        "Remove the characters, unless they are intended", "若非有意，删去这些字符",
    ),
    "LANGUAGE_STRAY": Code(
        WARNING, False, "A few rows are in a different script from the rest", "少数行整行使用另一种文字",
        "Check whether these rows belong here", "看看这些行是否应当在这里",
    ),
    "LANGUAGES_MIXED": Code(
        NOTE, False, "The rows are in several scripts", "数据含有多种文字",
        "No action is needed if this is intended", "若是有意，无须处理",
    ),
    "NOT_EXAMINED": Code(
        NOTE, False, "Something could not be checked", "有的部分无法检查",
        "Correct the other findings first, and run the doctor again", "先解决上面的问题，再运行一次",
    ),
}  # fmt: skip
