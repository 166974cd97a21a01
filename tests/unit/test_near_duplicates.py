"""Near duplicates: planted edits are detected, and texts that only look similar are not."""

import json
import random
import re

import pytest
from datasketch import MinHash
from hypothesis import given
from hypothesis import strategies as st

from qlora_helpers.data import near_duplicates
from qlora_helpers.data.near_duplicates import Index, is_slip, jaccard, same_question, same_text, shingles
from qlora_helpers.data.normal_form import PART, normalize
from qlora_helpers.data.schema import parse_guanaco
from qlora_helpers.data.sources import sample_data


def rows():
    """Return each sample conversation as one text."""
    lines = sample_data().read_text("utf-8").splitlines()
    return [PART.join(turn["content"] for turn in parse_guanaco(json.loads(line)["text"])) for line in lines]


def misspell(text, rng):
    """Swap two letters within a long word that has no neighbors of code."""
    words = [match.span() for match in re.finditer(r"(?<=[a-z] )[a-z]{7,}(?= [a-z])", text)]
    start, end = rng.choice([span for span in words if len(set(text[span[0] : span[1]])) > 4])
    i = next(i for i in range(start + 1, end - 1) if text[i] != text[i + 1])
    return text[:i] + text[i + 1] + text[i] + text[i + 2 :]


def swap_two_sentences(text, rng):
    """Swap two sentences within the last part."""
    *before, last = text.split(PART)
    sentences = re.split(r"(?<=[.!?])[ \n]+", last)
    i = rng.randrange(len(sentences) - 1)
    sentences[i], sentences[i + 1] = sentences[i + 1], sentences[i]
    return PART.join([*before, " ".join(sentences)])


PROSE = re.compile(r"([^\W\d_]|[\s.,;:!?’\"\0]|\b-\b)+")  # without numbers and symbols, which keep their place
EDITS = {
    "spelling": misspell,
    "punctuation": lambda text, rng: re.sub(r"(?<=[a-z])[.,;:](?=\s|$)", "", text) + "!!",
    "spacing": lambda text, rng: text.replace(" ", "  "),
    "case": lambda text, rng: text.upper(),
    "two sentences": swap_two_sentences,
}


def matches(texts, same=same_text):
    """Return the positions of the texts that the index considers near duplicates of an earlier text."""
    index = Index(0.7, same)
    return {number for number, text in enumerate(texts) if index.first_similar(text) is not None}


@pytest.mark.parametrize("edit", EDITS)
def test_planted_edits_of_prose_are_found_and_nothing_else(edit):
    """Every longer row of prose gets an edited copy; no other row may match."""
    rng = random.Random(1)
    originals = rows()
    copies = [
        EDITS[edit](text, rng) for text in originals if PROSE.fullmatch(text) and text.split(PART)[-1].count(". ") > 1
    ]
    hits = matches([*originals, *copies])
    assert len(copies) > 10
    assert hits == set(range(len(originals), len(originals) + len(copies)))


DIFFERENT = {
    "operator": ("What does a += b do in Python?", "What does a -= b do in Python?"),
    "comparison": ("What does a << b do in Python?", "What does a >> b do in Python?"),
    "language": ("How do I print a line in C?", "How do I print a line in C++?"),
    "sharp": ("How do I print a line in C++?", "How do I print a line in C#?"),
    "decimal point": ("Round the number 1.5 to the next integer.", "Round the number 15 to the next integer."),
    "sign": ("Take the absolute value of -5 in Python.", "Take the absolute value of 5 in Python."),
    "number": ("What is the area of a circle of radius 4?", "What is the area of a circle of radius 5?"),
    "bracket": ("Say whether every ( of a text is closed.", "Say whether every [ of a text is closed."),
    "dots of a path": ("Go up with the command cd ..", "Go up with the command cd ."),
    "option": ("Search all the folders with grep -r word .", "Search all the folders with grep -R word ."),
    "pattern": ("List the files anaconda.* in the folder.", "List the files anaconda* in the folder."),
    "file": ("Find the file with find -name passwd here.", "Find the file with find -name passw here."),
    "call": ("What does the class List(items) copy here?", "What does the class list(items) copy here?"),
    "argument": ("What is the value of max(a) in Python?", "What is the value of max(A) in Python?"),
    "identifier": ("What does total = sum(values) mean?", "What does total = sum(value) mean?"),
    "underscore": ("What is the use of user_name in this?", "What is the use of username in this?"),
    "factorial": ("What is the result of 5! + 3 here?", "What is the result of 5 + 3 here?"),
    "backticks": (
        "What is printed by the shell command echo `date` here?",
        "What is printed by the shell command echo date here?",
    ),
    "name": ("Which river flows through the town of Passau?", "Which river flows through the town of Torun?"),
    "Devanagari": ("इस शब्द का अर्थ क्या है: दिन", "इस शब्द का अर्थ क्या है: दीन"),
    "Arabic": ("ما معنى هذه الكلمة في الجملة: كَتَبَ", "ما معنى هذه الكلمة في الجملة: كُتِبَ"),
    "Thai": ("คำนี้แปลว่าอะไรในภาษาไทย: ป่า", "คำนี้แปลว่าอะไรในภาษาไทย: ป้า"),
    "Chinese": ("请问法国的首都是哪一座城市？", "请问德国的首都是哪一座城市？"),
    "umlaut": ("Was bedeutet in diesem Satz das Wort schon?", "Was bedeutet in diesem Satz das Wort schön?"),
}
LOOSE = ("identifier", "file", "backticks")


@pytest.mark.parametrize("same", [same_text, same_question])
@pytest.mark.parametrize("kind", [kind for kind in DIFFERENT if kind not in LOOSE])
def test_texts_that_differ_where_it_matters_are_different(kind, same):
    assert matches(DIFFERENT[kind], same) == set()


@pytest.mark.parametrize("kind", LOOSE)
def test_spelling_and_quotes_of_code_matter_in_training_rows_only(kind):
    assert matches(DIFFERENT[kind]) == set()
    assert matches(DIFFERENT[kind], same_question) == {1}


@pytest.mark.parametrize(
    "texts",
    [
        ("Hello, world", "hello world!"),
        ("He asked: “Is it late?” It was.", 'he asked, "is it late" — it was'),
        ("That isn't a well-known book.", "that isn’t a well known book"),
        ("Comment ça va aujourd'hui ?", "comment ça va aujourd’hui?"),
        ("x = a+b;  y = f(a,b)", "x=a + b\ny = f(a, b)"),
        ("你好，今天的天气怎么样？", "你好今天的天气怎么样"),
        ("यह किताब है। वह कलम है।", "यह किताब है वह कलम है"),
        ("How do I print a line in C++?", "how do i print a line in C++"),
        ("Cafe\u0301s are open.", "Cafés are open."),
        ("zero\u200bwidth", "zerowidth"),
    ],
)
def test_punctuation_spacing_and_case_of_prose_do_not_matter(texts):
    assert matches(texts) == {1}
    assert matches(texts, same_question) == {1}


FRAME = "Tell me one thing about {} that a child of ten would enjoy."
INSTRUCTION = (
    "You sort the letters that reach a museum. Read the letter below and name the room that has to answer it: the "
    "archive (documents, photographs), the shop (orders, refunds) or the workshop (repairs). Answer with one word. "
)
SLOTS = ["comets", "bees", "harps", "salt", "tunnels", "ferns", "owls", "ink", "dunes", "looms", "kelp", "brass"]


@pytest.mark.parametrize("same", [same_text, same_question])
@pytest.mark.parametrize("frame", [FRAME, INSTRUCTION + "My {} broke.", "Hi" + PART + "Hello!" + PART + FRAME])
def test_rows_in_one_frame_are_different(frame, same):
    texts = [frame.format(slot) for slot in SLOTS]
    assert jaccard(*(shingles(normalize(text)) for text in texts[:2])) > 0.5
    assert matches(texts, same) == set()


QUESTION = "How do I find all the files that changed today?"


@pytest.mark.parametrize(
    "other",
    [
        "Please, how do I find all the files that changed today?",
        "How do I find all the files today that changed?",
        "How can I find all the files that changed today?",
        "how do i fnid all the flies that changed today",
    ],
)
def test_another_wording_is_the_same_question_but_another_row(other):
    words = [normalize(text) for text in (QUESTION, other)]
    assert same_question(*words, common={"do", "can", "how"}) == ("flies" not in other)
    assert not same_text(*words)


def test_short_words_may_be_added_to_either_question():
    words = [normalize(text) for text in (QUESTION, f"So {QUESTION}")]
    assert same_question(*words)
    assert same_question(*words[::-1])


def test_a_word_of_its_own_on_both_sides_makes_another_question():
    other = normalize("How do I find all the folders that changed today?")
    assert not same_question(normalize(QUESTION), other)
    assert same_question(normalize(QUESTION), other, common={"folders", "files"})


def test_a_question_and_its_answer_do_not_trade_places():
    assert matches([f"Good morning.{PART}Guten Morgen.", f"Guten Morgen.{PART}Good morning."]) == set()
    assert matches([f"One cold day. Two long nights.{PART}Fine.", f"Two long nights. One cold day.{PART}Fine."]) == {1}


def test_moved_lines_of_code_make_another_text():
    assert matches(["x = 1\ny = x\nprint(y, x)", "y = x\nx = 1\nprint(y, x)"]) == set()


def test_texts_that_differ_only_at_the_end_of_a_long_document_are_different():
    document = " ".join(f"Sentence number {i} of a long document." for i in range(1000))
    assert len(document) > 30_000
    assert matches([f"{document} Who wrote it?", f"{document} When was it printed?"]) == set()


@pytest.mark.parametrize(
    ("a", "b", "slip"),
    [
        ("quarterly", "quartelry", True),
        ("copper", "coper", True),
        ("lantern", "lantarn", True),
        ("функция", "фукнция", True),
        ("affect", "effect", False),
        ("angles", "angel", False),
        ("minimum", "maximum", False),
        ("bread", "braid", False),
        ("form", "from", False),
        ("schon", "schön", False),
        ("सड़कें", "सड़कों", False),
        ("item12", "item13", False),
    ],
)
def test_a_slip_is_one_letter_of_a_long_word(a, b, slip):
    assert is_slip(a, b) is slip
    assert is_slip(b, a) is slip


def test_many_slips_make_another_text():
    text = "several letters within another sentence"
    assert matches([text, text.replace("letters", "lettars")]) == {1}
    assert not same_text(text, "severel lettars withen anothor sentunce")


def test_the_similarity_is_the_jaccard_index():
    a, b = shingles("abcdef"), shingles("bcdefg")
    assert len(a) == len(b) == 3
    assert jaccard(a, b) == 2 / 4
    assert jaccard(a, a) == 1


@given(st.text())
def test_every_text_equals_itself_and_its_normal_form_is_stable(text):
    assert shingles(normalize(text))
    assert matches([text, text]) == {1}
    assert normalize(f" {text}\n") == normalize(text)


@given(st.lists(st.from_regex(r"[a-z]{3,9}", fullmatch=True), min_size=8, max_size=12), st.sampled_from("+*/%<=&|^#"))
def test_one_more_operator_always_makes_another_text(words, operator):
    i = len(words) // 2
    assert matches([" ".join(words), " ".join([*words[:i], operator, *words[i:]])]) == set()


def test_the_first_similar_text_is_returned_with_its_similarity():
    index = Index(0.7, same_text)
    for text in ("The harbour lies to the north of the old town.", "A violin has four strings and no frets."):
        assert index.first_similar(text) is None
    assert index.first_similar("a violin has four strings, and no frets") == (1, 1.0)
    number, similarity = index.first_similar("A violin has four strigns and no frets.")
    assert number == 1
    assert 0.7 <= similarity < 1
    assert index.first_similar("Copper conducts heat.", add=False) is None
    assert index.first_similar("Copper conducts heat.", add=False) is None


WORDS = st.sampled_from(["a", "tin", "copper", "copperx", "Coper", "violin", "violni", "12", "+", "`", "சொல்லை", "."])


@given(st.lists(WORDS, min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_no_pair_is_kept_apart_before_it_is_compared(words, rng):
    """What groups texts for the search must be equal for all pairs that the tests of tokens accept."""
    other = [rng.choice([word, word, word[::-1], word[:2] + word[3:]]) or "a" for word in words]
    if rng.random() < 0.3:
        rng.shuffle(other)
    a, b = normalize(" ".join(words)), normalize(" ".join([*other, *rng.choice([[], ["word"]])]))
    assert near_duplicates._letters(a) == near_duplicates._letters(b) or not same_text(a, b)
    assert near_duplicates._figures(a) == near_duplicates._figures(b) or not same_question(a, b)


def test_rows_in_one_frame_are_not_all_compared_with_each_other(monkeypatch):
    """Their number would be the square of the number of rows."""
    compared = []
    aligned = near_duplicates._aligned
    monkeypatch.setattr(near_duplicates, "_aligned", lambda a, b: compared.append(a) or aligned(a, b))
    rng = random.Random(0)
    nouns = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(3, 9))) for _ in range(400)]
    texts = [INSTRUCTION + f"My {noun} and the {rng.choice(nouns)} broke." for noun in nouns]
    assert matches(texts) == set()
    assert len(compared) < 10 * len(texts)
    assert matches([*texts, texts[0].replace("museum", "musuem")]) == {400}


LONG = "When is the next train to Bern? I have to be at the airport of Zurich by six, and it may be late, as often."


@pytest.mark.parametrize("text", ["What is a variable in Python?", "Sum 1 + 2, then print it.", "Ah", LONG])
def test_the_signature_of_each_text_is_the_minhash_of_its_shingles(text):
    """Of a long text, they are those that begin a token."""
    flat = normalize(text).replace("\n", " ").casefold()
    assert (len(flat) > near_duplicates.SHORT) == (text is LONG)
    starts = [0, *(place + 1 for place, letter in enumerate(flat) if letter == " ")]
    initial = {number for start in starts for number in shingles(f"{flat}   "[start : start + 4])}
    wanted = MinHash(near_duplicates.PERMUTATIONS, hashfunc=int)
    wanted.update_batch(initial if text is LONG else shingles(flat))
    assert Index(0.7)._signature(normalize(text), text is not LONG).digest().tolist() == wanted.digest().tolist()


def misspelled_or_longer(text, rng):
    """Misspell some long words of a text, or add words to it."""
    share, words = rng.uniform(0.05, 0.3), text.split()
    if rng.random() < 0.5:
        return " ".join(w[:-2] + w[-1] + w[-2] if len(w) > 6 and rng.random() < share else w for w in words)
    return " ".join(w if rng.random() > share else f"{w} {rng.choice(words)}" for w in words)


def _similarity(a, b):
    return jaccard(shingles(a), shingles(b))


@pytest.mark.parametrize("least", [0, 60, 90, 120, 200])
def test_nearly_all_near_duplicates_are_proposed(least):
    """Compared with a search of all pairs. Texts of each length, also around the limit of short ones."""
    rng = random.Random(0)
    originals = {turn[: least + rng.randint(20, 60)] for text in rows() for turn in text.split(PART)}
    originals = sorted(text for text in originals if len(text) >= least + 20)
    kept = {normalize(text) for text in originals}
    index, alike, found = Index(0.7), 0, 0
    for text in originals:
        index.first_similar(text)
    for text in originals:
        other = misspelled_or_longer(text, rng)
        words = normalize(other)
        if words not in kept and any(same_question(words, t) and _similarity(words, t) >= 0.7 for t in kept):
            alike += 1
            found += index.first_similar(other, add=False) is not None
    assert alike > 100
    assert found >= 0.98 * alike
