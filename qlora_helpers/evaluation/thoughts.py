"""The thought that some models write before an answer, between `<think>` and `</think>`."""


def split_thought(text: str) -> tuple[str, str]:
    """Split a generated text at the marks `<think>` and `</think>` into the thought and the words after it."""
    head, closed, rest = text.partition("</think>")
    if closed:
        return head.removeprefix("<think>").strip(), rest.strip()
    if text.startswith("<think>"):
        return text.removeprefix("<think>").strip(), ""
    return "", text
