"""An interactive chat in the terminal, with its slash commands."""

import json
import sys
from pathlib import Path

from utils.infer.generate import GenerateArgs, generate_ids, is_cut, prompt_ids, room_for, text_of
from utils.runtime.errors import UserError, nearest

COMMANDS = {
    "/reset": "start a new conversation with the same system message",
    "/system TEXT": "start a new one with this system message, or with the default one of the chat format",
    "/save FILE": "append the conversation to a .jsonl file, as a row for training",
    "/help": "show these lines",
    "/exit": "quit, as Ctrl-D does",
}
_HELP = "\n".join(f"  {name:<13} {text}" for name, text in COMMANDS.items()) + (
    "\n  //…           send a message that begins with one slash\n  Ctrl-C        stop an answer and drop its turn"
)


class Chat:
    """A model, its tokenizer and the conversation so far.

    Args:
        model: for generation.
        tokenizer: with a chat template.
        args: how tokens are chosen.
        system: the system message; None for the default of the chat format.
        allow_special: whether special tokens in messages are encoded as such, as for `prompt_ids`.
    """

    def __init__(self, model, tokenizer, args: GenerateArgs, system: str | None = None, allow_special: bool = False):
        self.model, self.tokenizer, self.args, self.allow_special = model, tokenizer, args, allow_special
        self.answers = 0
        self.begin(system)

    def begin(self, system: str | None) -> None:
        """Starts a new conversation with this system message."""
        self.system = system
        self.messages = [{"role": "system", "content": system}] if system else []

    def answer(self, prompt: str, stream: bool = True) -> str:
        """Generates the answer to `prompt` and keeps both turns.

        Args:
            prompt: the user's message.
            stream: whether to print the answer as it comes.

        Raises:
            UserError: the format refuses the conversation, or it fills the model's context.
        """
        from transformers import TextStreamer

        messages = [*self.messages, {"role": "user", "content": prompt}]
        ids = prompt_ids(self.model, self.tokenizer, messages, allow_special=self.allow_special)
        streamer = None
        if stream and self.args.num_beams == 1:  # beam search has no final token before its end
            spaces = {"clean_up_tokenization_spaces": False}
            streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True, **spaces)
        # the seed depends on the number of the answer, so that a repeated question is sampled anew
        new = generate_ids(self.model, self.tokenizer, [ids], self.args, [self.answers], streamer)[0]
        self.answers += 1
        text = text_of(self.tokenizer, new)
        if stream and not streamer:
            print(text)
        if stream:
            self._report_truncation(new, room_for(self.model, ids, self.args))
        self.messages = [*messages, {"role": "assistant", "content": text}]
        return text

    def _report_truncation(self, new: list[int], room: int) -> None:
        """Says so if an answer of at most `room` tokens ended without a stop token."""
        if not is_cut(self.model, new, room):
            return
        if room < self.args.max_new_tokens:
            print_notice("cut off: the model's context is full; /reset starts a new conversation")
        else:
            print_notice(f"cut off by --max_new_tokens {room}")

    def save(self, path: str) -> str:
        """Appends the conversation to a jsonl file, as an SFT row.

        Returns:
            a message with the number of turns and the file.

        Raises:
            UserError: there is no answer yet, or the file cannot be appended to.
        """
        file = Path(path).expanduser()
        if not path or file.suffix != ".jsonl":
            raise UserError(f"/save {path!r} is not a .jsonl file; give one, such as /save chats.jsonl")
        if not any(message["role"] == "assistant" for message in self.messages):
            raise UserError("there is no answer to save yet; send a message first")
        try:
            with file.open("ab+") as opened:
                if opened.tell():
                    opened.seek(-1, 2)
                    unterminated = opened.read(1) != b"\n"  # the last line may lack its line feed
                else:
                    unterminated = False
                row = json.dumps({"messages": self.messages}, ensure_ascii=False)
                opened.write(("\n" * unterminated + row + "\n").encode())
        except OSError as error:
            raise UserError(f"/save {path!r}: {error.strerror}; give another file") from error
        return f"saved {len(self.messages)} turns at the end of {file}"


def run_chat(chat: Chat) -> None:
    """Reads messages and commands from stdin, one a line, until it ends. Answers go to stdout, all else to stderr."""
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401  (gives input() editing and a history)
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # a byte that is not UTF-8 must not end the chat
    print_notice("type a message; /help lists the commands, Ctrl-D quits, Ctrl-C stops an answer")
    while True:
        try:
            text = input("> " if terminal else "").strip()
        except EOFError:
            if terminal:
                print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            print(file=sys.stderr)
            print_notice("Ctrl-D or /exit quits")
            continue
        try:
            if text.startswith("/") and not text.startswith("//"):
                if not run_command_line(chat, text):
                    return
            elif text:
                chat.answer(text[1:] if text.startswith("//") else text)
        except UserError as error:
            print_notice(error.sentences() + ("" if text.startswith("/save") else "; /reset starts a new conversation"))
        except KeyboardInterrupt:
            print(file=sys.stderr)
            print_notice("stopped; this turn is dropped")


def run_command_line(chat: Chat, text: str) -> bool:
    """Runs a slash command such as `"/system Be brief."`; returns whether the chat continues."""
    name, _, rest = text.partition(" ")
    rest = rest.strip()
    known = [command.split()[0] for command in COMMANDS]
    if name not in known:
        print_notice(
            f"{name} is not a command.{nearest(name, known)} /help lists them; // sends a message that begins with /"
        )
    elif rest and name not in ("/system", "/save"):
        print_notice(f"{name} takes no argument, but {rest!r} was given; nothing is done")
    elif name == "/exit":
        return False
    elif name == "/help":
        print(_HELP, file=sys.stderr)
    elif name == "/save":
        print_notice(chat.save(rest))
    else:
        chat.begin(chat.system if name == "/reset" else rest or None)
        system = (
            f"the system message {chat.system!r}" if chat.system else "the default system message of the chat format"
        )
        print_notice(f"a new conversation, with {system}")
    return True


def print_notice(text: str) -> None:
    """Prints a line that is not part of an answer, to stderr."""
    print(f"({text})", file=sys.stderr, flush=True)
