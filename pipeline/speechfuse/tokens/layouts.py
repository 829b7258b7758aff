"""Chat layouts of tokenizers that are not Llama 3's, read from their own chat templates.

In: a tokenizer. Out: what its template puts around the texts of a conversation, which must be the
same in every turn. Speech may stand among these texts, which a template itself knows nothing of.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Piece = int | str  # the id of a control token, or text


@dataclass(frozen=True)
class Layout:
    """`first` and `user` stand before the text of the first and of a later user, `reply` behind it,
    where a model is asked to go on, `answer` and `end` before and behind what it says, `system`
    before and behind a system prompt, up to the first user's text; [] where it has no place."""

    first: list[Piece]
    user: list[Piece]
    reply: list[Piece]
    answer: list[Piece]
    end: list[Piece]
    system: list[list[Piece]]

    def around(self, role: str, before: str | None) -> tuple[list[Piece], list[Piece]]:
        """Return what stands before and behind the text of `role`, which follows the role `before`.
        Raises ValueError for a role that has no place there."""
        if role == "system" and before is None and self.system:
            return self.system[0], self.system[1]
        if role == "user" and before != "user":
            return {None: self.first, "system": []}.get(before, self.user), self.reply
        if role == "assistant" and before == "user":
            return self.answer, self.end
        raise ValueError(f"the chat template has no place for {role} behind {before or 'nothing'}")


def of_template(tokenizer: "PreTrainedTokenizerBase") -> Layout:
    """Return the layout of a tokenizer's chat template. Raises ValueError where there is none, or
    where turns differ by their number or what follows."""
    name = tokenizer.name_or_path

    def parts(*roles: str, generate: bool = False) -> list[str]:
        marks = [f"zq{number}zq" for number in range(len(roles))]
        turns: list[Any] = [{"role": r, "content": m} for r, m in zip(roles, marks, strict=True)]
        try:
            text = tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=generate, enable_thinking=False
            )
        except Exception as error:  # of jinja, or what a template says in words of its own
            raise ValueError(f"{name}: its chat template cannot be used: {error}") from None
        found = re.split("|".join(marks), str(text))
        if len(found) != len(roles) + 1:
            raise ValueError(f"{name}: its chat template does not keep the texts of {roles}")
        return found

    if not tokenizer.chat_template:
        raise ValueError(
            f"{name}: the tokenizer has no control tokens of Llama 3 and no chat template of its "
            "own: put chat_template.jinja beside it"
        )
    first, reply, between, again, end = parts("user", "assistant", "user", "assistant")
    asked = parts("user", generate=True)[1]
    if reply != again or not between.startswith(end) or not reply.startswith(asked):
        raise ValueError(
            f"{name}: its chat template lays out turns differently by their place (as one that "
            "thinks): put one that does not into chat_template.jinja"
        )
    try:
        system = parts("system", "user", "assistant")
    except ValueError:
        system = []
    control = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    pattern = f"({'|'.join(map(re.escape, control))})"

    def pieces(text: str) -> list[Piece]:
        split = [part for part in re.split(pattern, text) if part]
        return [tokenizer.get_added_vocab().get(part, part) for part in split]

    user = pieces(between.removeprefix(end))
    around = [pieces(text) for text in system[:2]]
    answer = pieces(reply.removeprefix(asked))
    layout = Layout(pieces(first), user, pieces(asked), answer, pieces(end), around)
    if not any(isinstance(piece, int) for piece in layout.end):
        raise ValueError(
            f"{name}: its chat template ends a reply with no token: put eos_token there"
        )
    return layout
