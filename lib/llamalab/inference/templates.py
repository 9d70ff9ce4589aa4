"""Prompt templates: the text that is put around what a person types.

An instruction-tuned model has met every question of its training inside one fixed text.
The alpaca family answers well only inside that text; the llama family continues plain
text and takes no template.
"""

from collections.abc import Sequence
from dataclasses import dataclass

Turn = tuple[str, str]
"""One finished turn of a conversation: (instruction, answer)."""


@dataclass(frozen=True)
class PromptTemplate:
    """A header, said once, and a text that is repeated for each turn.

    `turn` holds `{instruction}` where the person's text goes. An answer of an earlier turn
    follows its turn directly and is parted from the next one by `separator`.
    """

    name: str
    header: str
    turn: str
    separator: str = "\n\n"

    def render(self, prompt: str, history: Sequence[Turn] = ()) -> str:
        """Return the text the model is to continue: earlier turns, then `prompt`."""
        text = self.header
        for instruction, answer in history:
            text += self._turn(instruction) + answer + self.separator
        return text + self._turn(prompt)

    def _turn(self, instruction: str) -> str:
        # Not str.format: a brace in what the person typed is only a brace.
        return self.turn.replace("{instruction}", instruction)


TEMPLATES = {
    "none": PromptTemplate("none", header="", turn="{instruction}", separator="\n"),
    # The text of the Chinese-LLaMA-Alpaca project's inference script.
    "alpaca": PromptTemplate(
        "alpaca",
        header="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n",
        turn="### Instruction:\n\n{instruction}\n\n### Response:\n\n",
    ),
    # The same said in Chinese, in which no published model was trained: for experiments.
    "alpaca-zh": PromptTemplate(
        "alpaca-zh",
        header="下面是一条描述任务的指令。请写出一个恰当地完成要求的回答。\n\n",
        turn="### 指令：\n\n{instruction}\n\n### 回答：\n\n",
    ),
}


def template_mistake(family: str, template: str) -> str:
    """Return one sentence on a template that the family was not trained with, or ""."""
    if family == "llama" and template != "none":
        return (
            f"The llama family continues text; inside the '{template}' template it meets a text "
            "that it was never trained on."
        )
    if family == "alpaca" and template == "none":
        return "The alpaca family follows instructions only inside its template (--with-prompt)."
    return ""


def render_text(prompt: str, template: str, history: Sequence[Turn] = ()) -> str:
    """Return the exact text that a model is given; `template` is a name in `TEMPLATES`."""
    text = TEMPLATES[template].render(prompt, history)
    return text.encode("utf-8", "replace").decode()  # half a surrogate pair is no character
