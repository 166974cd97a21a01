"""Precision and recall of the search for near duplicates, on planted pairs in several scripts.

usage: python benchmarks/near_duplicates.py [--out FILE]

Each pair is a row and its edited copy, among the project's own conversations. Half of the kinds of edits leave the
meaning as it is, the other half change it. Two searches are scored: the one for copies among training rows, and the one
for training rows that are also held out. The pairs are written for this script, or made from its sentences.
"""

import argparse
import copy
import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from qlora_helpers import files
from qlora_helpers.data.leaks import HeldOut, parts
from qlora_helpers.data.near_duplicates import Index, same_text
from qlora_helpers.data.schema import Row, parse_guanaco
from qlora_helpers.data.sources import sample_data

Pair = tuple[Row, Row]
THRESHOLD = 0.7  # the default of near_duplicates

# A question and the sentences of its answer, one per line.
PROSE = """
Why do leaves change their color in autumn?
The green pigment is broken down, as less light arrives.
Yellow pigments were there before.
They only become visible now.

How can I keep basil alive on a kitchen window?
Water it from below, every other day.
Cut whole stems instead of single leaves.
It also needs several hours of sunlight.

What makes a bicycle stay upright, when it moves?
The rider steers a little into every fall.
The front wheel supports this by itself.
Spinning wheels contribute less than is often believed.

Warum leuchtet der Himmel am Abend so rot, Herr Lehrer?
Das Licht legt einen längeren Weg zurück.
Blaues Licht wird dabei stärker gestreut.
Übrig bleibt der rote Anteil.

Wie lange muss ein Brotteig im Kühlschrank ruhen?
Eine ganze Nacht reicht, aber kürzer geht auch.
Kälte verlangsamt die Hefe deutlich.
Der Geschmack wird dadurch kräftiger.

¿Por qué flota el hielo en el agua, si es sólido?
El agua se dilata cuando se congela.
Por eso el hielo pesa menos que el agua desplazada.
Pocas sustancias hacen lo mismo.

¿Cómo se limpia una sartén de hierro sin dañarla?
Primero se frota con sal gruesa, todavía caliente.
Después se seca completamente.
Una capa fina de aceite evita el óxido.

Почему птицы осенью улетают на юг, а не на север?
Зимой им не хватает корма.
На юге насекомые есть круглый год.
Весной птицы возвращаются обратно.

Как правильно заваривать зелёный чай дома?
Вода должна немного остыть.
Заваривать нужно недолго, около пары минут.
Слишком горячая вода делает напиток горьким.

Γιατί η θάλασσα είναι αλμυρή, ενώ τα ποτάμια όχι;
Τα ποτάμια μεταφέρουν άλατα από τα πετρώματα.
Το νερό εξατμίζεται, τα άλατα μένουν.
Αυτό συνεχίζεται για εκατομμύρια χρόνια.

चाँद का आकार हर रात क्यों बदलता है?
सूरज चाँद के आधे हिस्से को रोशन करता है।
हम उसे अलग-अलग कोण से देखते हैं।
इसलिए उसका आकार बदलता दिखता है।

لماذا يطفو الخشب فوق الماء، بينما يغرق الحديد؟
كثافة الخشب أقل من كثافة الماء.
أما الحديد فهو أثقل من الماء.
لكن السفن مجوفة من الداخل.

为什么夏天的白天比冬天长，你能解释一下吗？
地球的自转轴是倾斜的。
夏天北半球朝向太阳。
所以太阳在天上停留的时间更长。

김치는 왜 시간이 지나면 신맛이 강해지나요?
유산균이 당분을 분해합니다.
그 과정에서 젖산이 생깁니다.
차갑게 보관하면 발효가 느려집니다.
"""
PARAPHRASES = [
    (
        "How do I remove a file that is tracked by git?",
        "Please tell me: how do I remove a file that is tracked by git?",
    ),
    ("Explain what a hash table is used for.", "Explain what is a hash table used for?"),
    ("How can I boil an egg so that the yolk stays soft?", "How do I boil an egg so that the yolk stays soft?"),
    ("What is the best way to learn the names of the stars?", "What is the best way to learn names of the stars?"),
    (
        "Write a short poem about a lighthouse in the fog.",
        "Please write a short poem about a lighthouse in the fog.",
    ),
    ("Why does bread go stale faster in the fridge?", "In the fridge, why does bread go stale faster?"),
    ("List the planets of the solar system by their size.", "List all the planets of the solar system by size."),
    ("Welche Vögel bleiben im Winter in Norwegen?", "Welche Vögel bleiben denn im Winter in Norwegen?"),
    ("¿Cuántos días tarda la luna en dar una vuelta?", "Dime, ¿cuántos días tarda la luna en dar una vuelta?"),
    ("Почему листья осенью становятся жёлтыми?", "Почему осенью листья становятся жёлтыми?"),
    ("怎样才能让面包在家里保持松软？", "请问，怎样才能让面包在家里保持松软？"),
    ("Summarize why the Roman roads lasted for so long.", "Give a summary of why Roman roads have survived until now."),
]
OPERATORS = ["+=", "-=", "*=", "/=", "==", "!=", "<<", ">>", "<=", ">=", "&&", "||", "&", "|", "^", "%"]
BRACKETS = ["(", "[", "{", "<"]
FRAME = "Tell me one thing about {} that a child of ten would enjoy."
INSTRUCTION = (
    "You sort the mail of a museum. Read the message of a visitor and name the room that answers it: archive "
    "(documents, photographs), shop (orders, refunds) or workshop (repairs). Answer with one word. Message: {}"
)
NOUNS = ["comets", "bees", "harps", "salt", "tunnels", "ferns", "owls", "ink", "dunes", "looms", "kelp", "brass"]
PLACES = ["Lisbon", "Oslo", "Quito", "Hanoi", "Accra", "Perth", "Turin", "Kyoto"]
SWAPS = {  # a frame, and values that each make another question
    "operator": [
        ("What does a {} b compute in this language?", OPERATORS),
        ("Explain `x{}y` in one sentence.", OPERATORS),
    ],
    "bracket": [('def balanced(s):\n    """Say whether every \'{}\' of s is closed."""', BRACKETS)],
    "language": [("How do I read a line from a file in {}?", ["C", "C++", "C#", "F#", "D", "R"])],
    "number": [
        ("What is {} plus 12, as a word?", ["3", "4", "-4", "0.4", "40", "4.0"]),
        ("Wie viele Stunden haben {} Wochen genau?", ["3", "4", "5"]),
        ("一共有{}个苹果，每人分到几个？", ["12", "13", "1.3"]),
    ],
    "identifier": [
        ("What does `{}` return for an empty list?", ["max(a)", "Max(a)", "max(A)", "max_a", "maxa", "a.max()"]),
        ("Which files does {} list in my home folder?", ["ls -r", "ls -R", "ls -a", "ls -A"]),
    ],
    "name": [
        ("Which river flows through the city of {}?", PLACES),
        ("Welche Speisen isst man in {} am liebsten?", PLACES),
    ],
    "sentence frame": [(FRAME, NOUNS), ("We answer questions about {} on the second floor of the house.", NOUNS)],
    "constant instruction": [(INSTRUCTION, [f"My {noun} broke." for noun in NOUNS]), (INSTRUCTION, PLACES)],
    "vowel sign": [
        ("इस शब्द का अर्थ हिन्दी में क्या है: {}", ["दिन", "दीन", "दान", "दून"]),
        ("ما معنى هذه الكلمة في الجملة التالية: {}", ["كَتَبَ", "كُتِبَ", "كُتُب"]),
        ("คำนี้แปลว่าอะไรในภาษาไทย: {}", ["ป่า", "ป้า", "ปา"]),
        ("Was bedeutet in diesem Satz das Wort {}?", ["schon", "schön"]),
    ],
    "character": [
        ("请问{}国的首都是哪一座城市？", ["法", "德", "英"]),
        ("日本語で「{}」はどう読みますか。", ["山", "川", "田"]),
    ],
}


def row(question: str, answer: str, *before: str) -> Row:
    """A conversation that ends with the question and its answer."""
    turns = [*before, question, answer]
    return Row(tuple({"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)), "planted")


def misspell(text: str) -> str:
    """Swap two letters in the middle of the longest word."""
    word = max(re.findall(r"[^\W\d_]+", text), key=len)
    i = next(i for i in range(len(word) // 2, len(word) - 1) if word[i] != word[i + 1])
    return text.replace(word, word[:i] + word[i + 1] + word[i] + word[i + 2 :], 1)


def move_a_sentence(text: str) -> str:
    """Put the first sentence last."""
    first, *others = re.findall(r"[^.。।]+[.。।]\s*", text)
    return "".join(s.strip() + " " for s in [*others, first]).strip()


def prose() -> list[tuple[str, str]]:
    """Return the questions and answers in `PROSE`."""
    blocks = [block.splitlines() for block in PROSE.strip().split("\n\n")]
    return [(question, " ".join(sentences)) for question, *sentences in blocks]


def _edited(edit: Callable[[str], str], cased: bool = False) -> list[Pair]:
    return [(row(q, a), row(edit(q), edit(a))) for q, a in prose() if not cased or q.lower() != q.upper()]


def same_pairs() -> dict[str, list[Pair]]:
    """Rows and copies with the same meaning, by kind of edit."""
    reworded = [(row(a, f"Answer {i}."), row(b, f"Answer {i}.")) for i, (a, b) in enumerate(PARAPHRASES)]
    return {
        "capitals": _edited(str.upper, cased=True),
        "small letters": _edited(str.lower, cased=True),
        "punctuation": _edited(lambda text: re.sub(r"[,，、،¿]|[.?。？؟।;]$", "", text) + "!"),
        "spacing": _edited(lambda text: text.replace(" ", "  ") + "\n"),
        "misspelling": _edited(misspell, cased=True),
        "moved sentence": [(row(q, a), row(q, move_a_sentence(a))) for q, a in prose()],
        "paraphrased question": reworded,
    }


def different_pairs() -> dict[str, list[Pair]]:
    """Rows and copies with another meaning, by what was swapped. Their answers are equal, as the hardest case."""
    planted = {
        kind: [
            (row(frame.format(a), "See above."), row(frame.format(b), "See above."))
            for frame, values in frames
            for i, a in enumerate(values)
            for b in values[i + 1 :]
        ]
        for kind, frames in SWAPS.items()
    }
    hello = ("Hi", "Hello! How can I help you today?")
    chats = [row(f"My {noun} never arrived. What now?", "Sorry.", *hello) for noun in NOUNS]
    return planted | {"after a greeting": [(a, b) for i, a in enumerate(chats) for b in chats[i + 1 :]]}


def is_copy(a: Row, b: Row) -> bool:
    """Return whether the search for copies drops `b` after `a`."""
    index = Index(THRESHOLD, same_text)
    index.first_similar(parts(a))
    return index.first_similar(parts(b)) is not None


def is_leak(a: Row, b: Row, empty: HeldOut) -> bool:
    """Return whether `b` is a leak if `a` is held out."""
    held = copy.deepcopy(empty)
    held.add(a)
    return held.leak(b) is not None


def measure() -> list[dict[str, Any]]:
    """Count for each kind of pair how many each search finds."""
    lines = sample_data().read_text("utf-8").splitlines()
    sample = [Row(tuple(parse_guanaco(json.loads(line)["text"])), "sample") for line in lines]
    same, different = same_pairs(), different_pairs()
    different["neighboring conversations"] = list(pairwise(sample))
    planted = [row for pairs in (same | different).values() for pair in pairs for row in pair]
    empty = HeldOut([*sample, *planted], THRESHOLD)
    return [
        {
            "kind": kind,
            "same": kind in same,
            "pairs": len(pairs),
            "copies": sum(is_copy(a, b) for a, b in pairs),
            "leaks": sum(is_leak(a, b, empty) for a, b in pairs),
        }
        for kind, pairs in (same | different).items()
    ]


def summarize(kinds: list[dict[str, Any]], search: str) -> dict[str, float]:
    """Return the precision and the recall of one search over all kinds of pairs."""
    right = sum(kind[search] for kind in kinds if kind["same"])
    return {
        "precision": right / sum(kind[search] for kind in kinds),
        "recall": right / sum(kind["pairs"] for kind in kinds if kind["same"]),
    }


def main() -> None:
    """Print a table of all kinds, then the precision and recall of both searches."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    kinds = measure()
    print("| pairs that | kind | pairs | found as copies | found as leaks |\n|---|---|---|---|---|")
    for kind in kinds:
        meaning = "mean the same" if kind["same"] else "differ"
        print(f"| {meaning} | {kind['kind']} | {kind['pairs']} | {kind['copies']} | {kind['leaks']} |")
    searches = {search: summarize(kinds, search) for search in ("copies", "leaks")}
    for search, scores in searches.items():
        print(f"{search}: precision {scores['precision']:.1%}, recall {scores['recall']:.1%}")
    if args.out:
        files.write_json(args.out, {"threshold": THRESHOLD, "kinds": kinds, **searches})


if __name__ == "__main__":
    main()
