"""A conversation with a model, and the commands that may stand between its turns."""

import json
import sys
from pathlib import Path

from utils.infer.generate import GenerateArgs, generate_ids, prompt_ids, room_for, text_of
from utils.runtime.errors import UserError, nearest

COMMANDS = {
    "/reset": "begin a new conversation; the system message stays",
    "/system TEXT": "begin a new one with this system message; without TEXT with the format's own",
    "/save FILE": "append the conversation to a .jsonl file, as a row that can be trained on",
    "/help": "these lines",
    "/exit": "end; Ctrl-D does so too",
}
_HELP = "\n".join(f"  {name:<13} {text}" for name, text in COMMANDS.items()) + (
    "\n  //…           a message that begins with a slash: it is sent with one\n"
    "  Ctrl-C        stop an answer; that turn is forgotten"
)


class Chat:
    """A model, its tokenizer and the conversation so far.

    Args:
        model: for generation.
        tokenizer: with a chat template.
        args: how tokens are chosen.
        system: the system message; None for the format's own.
        allow_special: whether special tokens may stand in what is said, as for `prompt_ids`.
    """

    def __init__(self, model, tokenizer, args: GenerateArgs, system: str | None = None, allow_special: bool = False):
        self.model, self.tokenizer, self.args, self.allow_special = model, tokenizer, args, allow_special
        self.answers = 0
        self.begin(system)

    def begin(self, system: str | None) -> None:
        """Forgets the conversation and begins one with this system message."""
        self.system = system
        self.messages = [{"role": "system", "content": system}] if system else []

    def answer(self, prompt: str, stream: bool = True) -> str:
        """Generates the answer to `prompt` and keeps both turns.

        Args:
            prompt: what the user says.
            stream: whether to print the answer as it comes.

        Raises:
            UserError: the format refuses the conversation, or it fills the model's context.
        """
        from transformers import TextStreamer

        messages = [*self.messages, {"role": "user", "content": prompt}]
        ids = prompt_ids(self.model, self.tokenizer, messages, allow_special=self.allow_special)
        streamer = None
        if stream and self.args.num_beams == 1:  # a beam may still be taken back
            spaces = {"clean_up_tokenization_spaces": False}
            streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True, **spaces)
        # a number for each answer: the same question sampled again gets another
        new = generate_ids(self.model, self.tokenizer, [ids], self.args, [self.answers], streamer)[0]
        self.answers += 1
        text = text_of(self.tokenizer, new)
        if stream and not streamer:
            print(text)
        if stream:
            self._tell_a_cut(new, room_for(self.model, ids, self.args))
        self.messages = [*messages, {"role": "assistant", "content": text}]
        return text

    def _tell_a_cut(self, new: list[int], room: int) -> None:
        stops = self.model.generation_config.eos_token_id
        if len(new) < room or new[-1] in (stops if isinstance(stops, list) else [stops]):
            return
        if room < self.args.max_new_tokens:
            tell("cut off: the model's context is full; /reset begins a new conversation")
        else:
            tell(f"cut off by --max_new_tokens {room}")

    def save(self, path: str) -> str:
        """Appends the conversation to a jsonl file, as an SFT row.

        Returns:
            what was done.

        Raises:
            UserError: there is nothing to save, or the file is none to append to.
        """
        file = Path(path).expanduser()
        if not path or file.suffix != ".jsonl":
            raise UserError(f"/save {path!r} is not a .jsonl file; give one, such as /save chats.jsonl")
        if not any(message["role"] == "assistant" for message in self.messages):
            raise UserError("there is no answer to save yet; say something first")
        try:
            with file.open("ab+") as opened:
                if opened.tell():
                    opened.seek(-1, 2)
                    begun = opened.read(1) != b"\n"  # someone's last line without its end
                else:
                    begun = False
                row = json.dumps({"messages": self.messages}, ensure_ascii=False)
                opened.write(("\n" * begun + row + "\n").encode())
        except OSError as error:
            raise UserError(f"/save {path!r}: {error.strerror}; give another file") from error
        return f"saved {len(self.messages)} turns at the end of {file}"


def talk(chat: Chat) -> None:
    """Reads messages and commands from stdin, line by line, until it ends; only answers go to stdout."""
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401  (gives input() editing and a history)
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # one bad byte is no reason to end
    tell("say something; /help lists the commands, Ctrl-D ends, Ctrl-C stops an answer")
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
            tell("Ctrl-D or /exit ends")
            continue
        try:
            if text.startswith("/") and not text.startswith("//"):
                if not obey(chat, text):
                    return
            elif text:
                chat.answer(text[1:] if text.startswith("//") else text)
        except UserError as error:
            tell(error.sentences() + ("" if text.startswith("/save") else "; /reset begins anew"))
        except KeyboardInterrupt:
            print(file=sys.stderr)
            tell("stopped; this turn is forgotten")


def obey(chat: Chat, text: str) -> bool:
    """Does what a command says, `"/system Be brief."`; returns whether the chat goes on."""
    name, _, rest = text.partition(" ")
    rest = rest.strip()
    known = [command.split()[0] for command in COMMANDS]
    if name not in known:
        tell(f"{name} is not a command.{nearest(name, known)} /help lists them; // sends a message that begins with /")
    elif rest and name not in ("/system", "/save"):
        tell(f"{name} takes nothing after it, and {rest!r} stands there; nothing is done")
    elif name == "/exit":
        return False
    elif name == "/help":
        print(_HELP, file=sys.stderr)
    elif name == "/save":
        tell(chat.save(rest))
    else:
        chat.begin(chat.system if name == "/reset" else rest or None)
        system = f"the system message {chat.system!r}" if chat.system else "no system message but the format's own"
        tell(f"a new conversation, with {system}")
    return True


def tell(text: str) -> None:
    """Says something beside the answers."""
    print(f"({text})", file=sys.stderr, flush=True)
