"""Rendering of prompts: the Qwen2 chat template with the released modality tags.

The released GRPO prompt is the default (`<|vision_start|><|video_pad|><|vision_end|>` stems from
the Qwen2-VL chat template that the released trainer uses); every piece of text is data.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PromptTemplate:
    """How a question becomes a prompt.

    Attributes:
        system: the system turn.
        instruction: what follows the question (the request for tags); may be empty.
        separator: between question and instruction.
        video_placeholder: puts the template's vision tokens before the tags.
        modal: "video_audio", "video" or "audio": which tags the prompt holds.
    """

    system: str
    instruction: str = ""
    separator: str = "\n"
    video_placeholder: bool = True
    modal: str = "video_audio"

    def user_text(self, question: str) -> str:
        """Question and instruction; this is also what the router reads."""
        return question + (self.separator + self.instruction if self.instruction else "")

    def render(self, question: str) -> str:
        """The whole prompt up to the start of the assistant's turn."""
        video, audio = "video" in self.modal, "audio" in self.modal
        tags = ""
        if video and self.video_placeholder:
            tags += "<|vision_start|><|video_pad|><|vision_end|>"
        if video:
            tags += "<vi_start><video><vi_end>\n"
        if audio:
            tags += "<au_start><audio><au_end>\n"
        return (
            f"<|im_start|>system\n{self.system}<|im_end|>\n"
            f"<|im_start|>user\n{tags}{self.user_text(question)}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
