"""Write a text as its tokens, so that punctuation, spacing and case of prose do not matter when texts are compared."""

import re
import unicodedata

PART = "\0"  # between the turns and fields of a row, whose text never contains it

# Combining marks spell vowels in many scripts, and joiners change words in some, but \w matches neither.
MARKS = "".join(c for c in map(chr, range(0x300, 0x10000)) if unicodedata.category(c)[0] == "M") + "\u200c\u200d"
WORD = rf"[\w{MARKS}]"
LETTER = r"[^\W\d_]"
CLOSING = r"(?:[\"'”’»)\]]|\*\*)"
INVISIBLE = re.compile("[\xad\u200b\u200e\u200f\u2060\ufeff]")
# Each pattern starts with a set of all characters that it is about, and looks behind afterwards: `re` skips the others.
APOSTROPHE = re.compile(rf"['’](?<={LETTER}.)(?={LETTER})")
# The end of a sentence. French sets a space before a question mark; 5! is a factorial unless it ends the line.
STOP = re.compile(
    r"[.!?… \xa0\u202f。！？؟۔\u0964\u0965\n](?:(?:"
    r"(?<=[.!?…])(?<=[^\s.!?…\\/~$].)(?<!\d!(?=[ \t]*\S))[.!?…]*"
    r"|(?<=[ \xa0\u202f])(?<=[^\s.!?…\\/~$].)[!?]+(?=\s*\Z|\s+[^\W\d_a-z]))"
    rf"(?={CLOSING}*(?:\s|\Z))|(?<=[。！？؟۔\u0964\u0965\n]))"
)
# Marks that only structure prose. All others count: operators, brackets, the dots of 1.5 and a.b, the colon of 7:30.
PROSE = re.compile(
    r"[,،、，；：؛“”„‟«»‹›「」『』《》¿¡–—―…‘’;:\-\"'](?:(?<=[,،、，；：؛“”„‟«»‹›「」『』《》¿¡–—―…‘’])"
    rf"|(?<=[;:])(?<={WORD}.|[)\]\"'].)(?=\s|\Z)"
    rf"|(?<=-)(?<={LETTER}{LETTER}.)(?={LETTER}{LETTER})"
    rf"|(?<=[\"'])(?:(?<!\S.)(?<![=+(<>|&\[{{]\s.)(?={WORD})|(?<={WORD}.|\n.)(?=[\s;:,]|\Z)))",
    re.DOTALL,
)
UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")  # Han and Kana: every character is a token
TOKEN = re.compile(rf"(\d++(?:\.\d+)+|{WORD}++|\S)(?=(\S?))")  # and the character that follows
LETTERS = re.compile(rf"(?:{LETTER}|[{MARKS}])+")
OPERATORS = frozenset("+-*/%=<>!&|^~@$#\\.:?;")  # make code of a word that they are attached to
ASSIGNING = frozenset("=<>+|&")  # the same, even across spaces
BRACKETS = frozenset("([")


def normalize(text: str) -> str:
    """Return the tokens of a text, with spaces between tokens and line breaks between sentences.

    Tokens are words, numbers, single symbols, and single characters of scripts without spaces. Punctuation of prose is
    left out. Case is kept only in code.
    """
    if not text.isascii():
        text = INVISIBLE.sub("", unicodedata.normalize("NFC", text))
    text = PROSE.sub(" ", STOP.sub("\n", APOSTROPHE.sub("", text).replace(PART, f"\n{PART}\n")))
    lines = (text if text.isascii() else UNSPACED.sub(r" \g<0> ", text)).split("\n")
    sentences = (" ".join(_words(line, number > 0)) for number, line in enumerate(lines))
    return "\n".join(line for line in sentences if line)


def _words(line: str, follows: bool) -> list[str]:
    """Return the tokens of a line, in lower case unless they are code. `follows` says whether a line precedes it."""
    if line.isascii() and "".join(line.split()).isalpha():  # as in most prose, and quickly found
        return line.lower().split()
    found = _tokens(line, follows)
    words = [token for token, _ in found]
    for i in [i for i, token in enumerate(words) if not token.islower()]:
        if (folded := words[i].casefold()) != words[i] and not _in_code(found, i):
            words[i] = folded
    return words[follows:]


def _tokens(line: str, follows: bool) -> list[tuple[str, str]]:
    """Return the line break before a line and its tokens, each with the character that follows it, or "" at a blank."""
    found = [("\n", line[:1].strip())] if follows else []
    for part in line.split():
        if part.isalpha():
            found.append((part, ""))
        else:
            found += TOKEN.findall(part)
    return found


def _in_code(found: list[tuple[str, str]], i: int) -> bool:
    """Return whether token `i` is a part of code, as in `a = b`, `a.b`, `-a`, `a(`, and after `f(`."""
    following = found[i][1]
    before, after = found[i - 1] if i else ("", ""), found[i + 1][0] if i + 1 < len(found) else ""
    if before[0] in ASSIGNING or after in ASSIGNING:
        return True
    called = i > 1 and before[0] in BRACKETS and found[i - 2][1] == before[0] and found[i - 2][0] not in OPERATORS
    return bool(following and (after in OPERATORS or after in BRACKETS)) or bool(
        before[1] and (before[0] in OPERATORS or called)
    )
