"""Work shared among processes: the same results in the same order, wherever it is called from."""

import gc
import os
import subprocess
import sys

import joblib
import pytest

from qlora_helpers.data import cleaning, workers
from qlora_helpers.data.leaks import NEAR_ANSWER, HeldOut
from qlora_helpers.data.near_duplicates import Index, same_text
from qlora_helpers.data.schema import Row
from qlora_helpers.data.workers import without_garbage_collection
from qlora_helpers.files import ROOT


@pytest.fixture
def two(monkeypatch):
    """Share even a few items between two processes."""
    monkeypatch.setattr(workers, "MANY", 2)
    monkeypatch.setattr(joblib, "cpu_count", lambda: 2)


def row(question, answer):
    turns = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Row(turns, "line 1")


def who(items):
    return [(item, os.getpid()) for item in items]


def test_many_items_are_worked_on_in_other_processes_and_stay_in_order(two):
    found = list(workers.shared(lambda items: [(item, os.getpid()) for item in items], range(9)))
    assert [item for item, _ in found] == list(range(9))
    assert os.getpid() not in {process for _, process in found}


def test_few_items_start_no_process():
    assert list(workers.shared(who, range(9))) == who(range(9))


def test_a_script_without_a_main_guard_runs_once(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from qlora_helpers.data import workers\n"
        "import joblib\n"
        "workers.MANY, joblib.cpu_count = 2, lambda: 2\n"
        "print(list(workers.shared(sorted, [1, 2, 3, 4, 5])))\n"
    )
    found = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, env=found)
    assert (ran.stdout, ran.stderr) == ("[1, 2, 3, 4, 5]\n", "")


def test_other_processes_find_the_same_leaks(two):
    """Also by symbols, whose numbers must not depend on the seed that each process has for its hashes."""
    held_out = row("How is 17 + 4 written in Python?", "Write 17 + 4, which gives the number 21.")
    others = [row(f"Tell me {n} more things about sums.", f"There are {n} sums in the {n} books.") for n in range(8)]
    copy = row("Give an example of a sum.", "write 17 + 4, which gives the number 21!")
    held = HeldOut([held_out, copy, *others], 0.7)
    held.add(held_out)
    assert held.leaks([*others, copy]) == {copy.id: held.leak(copy)}
    assert held.leak(copy).reason == NEAR_ANSWER


def test_texts_prepared_by_several_processes_are_the_same_copies(two):
    rows = [row("Where is the harbour?", "The harbour lies north of the town.")] * 4
    first, *copies = workers.shared(cleaning._words, rows)
    index = Index(0.7, same_text)
    assert index.first_similar(first) is None
    assert [index.first_similar(words) for words in copies] == [(0, 1.0)] * 3


def test_rows_tokenized_by_several_processes_are_cleaned_alike(config, tokenizer, monkeypatch):
    """Token counts, reasons and the split, in the order of the rows."""
    own = config.replace(max_length=48, over_length="drop")
    alone = cleaning.clean(own, tokenizer, n_heldout=lambda usable: usable // 4)
    monkeypatch.setattr(workers, "MANY", 2)
    monkeypatch.setattr(joblib, "cpu_count", lambda: 2)
    asked = []
    measured = cleaning._measured
    monkeypatch.setattr(cleaning, "_measured", lambda *given: asked.append(given) or measured(*given))
    shared = cleaning.clean(own, tokenizer, n_heldout=lambda usable: usable // 4)
    assert asked == []  # in this process
    assert alone.dropped
    for name in ("lengths", "dropped", "train", "heldout"):
        assert getattr(alone, name) == getattr(shared, name)


def test_the_garbage_collector_is_as_it_was_afterwards():
    def fail():
        with without_garbage_collection():
            assert not gc.isenabled()
            raise ValueError("unreadable")

    assert gc.isenabled()
    with pytest.raises(ValueError, match="unreadable"):
        fail()
    assert gc.isenabled()
    gc.disable()
    try:
        with without_garbage_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
