"""The blind test: names stay hidden, every vote is kept, no pair comes twice; the result against exact numbers."""

import json
from threading import Thread

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.stats import binom

from qlora_helpers import UserError
from qlora_helpers.chat import blind
from qlora_helpers.chat.blind import Ballot, Panel, Result
from qlora_helpers.runs import RunFolder

NASTY = "<script>alert('x')</script> & $x$"
ENTRIES = [{"prompt": f"Question {n}?", "base": f"old {n}", "exp1": f"new {n}"} for n in range(12)]


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path / "exp1")


def click(panel, choice):
    panel.buttons[choice].click()


def prefer(panel, word):
    """Vote for the answer that contains `word`."""
    place = next(i for i, shown in enumerate(panel.answers) if word in shown.value)
    click(panel, ("first", "second")[place])


def test_clicks_become_votes_and_the_names_appear_at_the_end_only(run):
    panel = Panel(Ballot(ENTRIES, "base", "exp1", run))
    for name, shown in zip(("first", "second"), panel.answers, strict=True):
        assert f">{name}<" in shown.value
    everything = []
    for number in range(12):
        everything.append(" ".join([panel.question.value, *(a.value for a in panel.answers), panel.status.value]))
        assert len(blind.read(run / "votes.jsonl")) == number  # written at once
        prefer(panel, "new") if number < 9 else click(panel, ("tie", "skip")[number % 2])
    assert not any("base" in text or "exp1" in text for text in everything)
    assert "exp1 against base: 9 wins, 0 losses, 1 tie, 2 skipped" in panel.status.value
    assert all(button.disabled for button in panel.buttons.values())
    assert str(blind.results(run)[0]) == str(panel.ballot.result)


def lines(run):
    return (run / "votes.jsonl").read_text("utf-8").splitlines()


def test_judging_goes_on_where_it_stopped_and_no_pair_comes_twice(run):
    first = Ballot(ENTRIES, "base", "exp1", run)
    order = list(first.pairs)
    for choice in ("first", "skip", "tie"):
        first.vote(choice)
    again = Ballot([*ENTRIES, *ENTRIES], "base", "exp1", run)
    assert again.left_over == order[3:]
    turned = Ballot(ENTRIES, "exp1", "base", run)
    assert set(turned.left_over) == set(order[3:])
    for _ in order[3:]:
        again.vote("second")
    assert len({json.loads(line)["pair"] for line in lines(run)}) == len(lines(run)) == 12
    with pytest.raises(UserError, match="every pair has a vote"):
        again.vote("first")


def test_new_answers_are_a_new_pair(run):
    Ballot(ENTRIES[:1], "base", "exp1", run).vote("first")
    changed = [ENTRIES[0] | {"exp1": "newer"}]
    assert len(Ballot(changed, "base", "exp1", run).left_over) == 1


def test_clicks_at_once_lose_no_vote(run):
    panel = Panel(Ballot(ENTRIES, "base", "exp1", run))
    threads = [Thread(target=click, args=(panel, "tie")) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lines(run)) == 12


def test_order_of_pairs_and_answers_is_random_but_follows_the_seed(run):
    def seen(seed):
        ballot = Ballot(
            [{**e, "prompt": f"{e['prompt']}{k}"} for e in ENTRIES for k in range(20)], "base", "exp1", run, seed
        )
        return [(ballot.pairs[key]["prompt"], ballot.order(key)[0]) for key in ballot.pairs]

    assert seen(0) == seen(0) != seen(1)
    assert [question for question, _ in seen(0)] != sorted(question for question, _ in seen(0))
    first = sum(name == "base" for _, name in seen(0))
    assert 90 <= first <= 150  # of 240; a fair coin stays inside in 99.99% of seeds


def test_texts_are_escaped_and_names_with_markup_too(run):
    panel = Panel(Ballot([{"prompt": NASTY, "<b>a</b>": NASTY, "b": ""}], "<b>a</b>", "b", run))
    for shown in (panel.question, *panel.answers):
        assert "<script>" not in shown.value
        assert "tex2jax_ignore" in shown.value
    assert "(empty)" in "".join(shown.value for shown in panel.answers)
    click(panel, "first")
    assert "<b>" not in panel.status.value
    assert "&lt;b&gt;a" in panel.status.value


def test_equal_answers_are_not_judged(run):
    entries = [{"prompt": "?", "base": "same", "exp1": "same"}, ENTRIES[0], {"prompt": "!", "base": "alone"}]
    assert len(Ballot(entries, "base", "exp1", run).pairs) == 1
    equal = Ballot(entries[:1], "base", "exp1", run)
    assert repr(equal) == "base and exp1 gave the same answers everywhere: there is nothing to judge."
    assert Panel(equal).status.value == repr(equal)
    for wrong in (entries[2:], []):
        with pytest.raises(UserError, match="no answers of two models base and exp1"):
            Ballot(wrong, "base", "exp1", run)


def test_without_widgets_the_next_pair_is_text_with_how_to_vote(run):
    ballot = blind.judge(ENTRIES[:2], "base", "exp1", run)
    assert "pair 1 of 2" in repr(ballot)
    assert 'ballot.vote("first")' in repr(ballot)
    assert "base" not in repr(ballot)
    assert "pair 2 of 2" in repr(ballot.vote("tie"))
    assert "exp1 against base: 0 wins, 0 losses, 2 ties" in repr(ballot.vote("tie"))
    with pytest.raises(UserError, match="unknown vote 'both'"):
        ballot.vote("both")


def test_an_error_while_voting_is_shown_and_votes_stay(run):
    panel = Panel(Ballot(ENTRIES, "base", "exp1", run))
    run.path.mkdir()
    (run / "votes.jsonl").write_text("no vote\n")
    click(panel, "first")
    assert "error: votes: line 1 of" in panel.status.value
    assert lines(run) == ["no vote"]


def test_nine_of_ten_by_hand():
    """Binomial: twice 11 of 1,024 outcomes are as extreme. Wilson's interval of 9 of 10 is 0.596 to 0.982."""
    result = Result("base", "exp1", wins=9, losses=1, ties=5, skipped=2)
    assert result.p_value == pytest.approx(22 / 1024)
    assert (result.share.low, result.share.high) == pytest.approx((0.596, 0.982), abs=0.001)
    assert result.more == 0
    assert "exp1 is preferred" in str(result)
    assert "base is preferred" in str(Result("base", "exp1", 1, 9, 0, 0))
    assert "exp1 is not distinguishably preferred" in str(Result("base", "exp1", 6, 4, 0, 0))
    assert "neither is preferred" in str(Result("base", "exp1", 4, 4, 0, 0))


@pytest.mark.parametrize(("wins", "losses"), [(6, 4), (4, 6), (13, 7), (11, 9)])
def test_the_further_pairs_give_the_power_they_promise(wins, losses):
    """Exact power of the sign test with that many decided pairs."""
    result = Result("base", "exp1", wins, losses, 0, 0)
    n, share = wins + losses + result.more, max(wins, losses) / (wins + losses)
    rejecting = next(k for k in range(n // 2, n + 1) if 2 * binom.sf(k - 1, n, 0.5) < 0.05)
    assert binom.sf(rejecting - 1, n, share) == pytest.approx(0.8, abs=0.05)


def test_ties_take_their_part_of_the_further_pairs():
    without, half = Result("a", "b", 6, 4, 0, 0), Result("a", "b", 6, 4, 10, 3)
    assert half.more == pytest.approx(2 * without.more, abs=1)
    assert Result("a", "b", 5, 5, 2, 0).more is None
    assert Result("a", "b", 0, 0, 2, 1).more is None
    assert "No pair is decided yet" in str(Result("a", "b", 0, 0, 2, 1))


VOTE = st.fixed_dictionaries(
    {"pair": st.text(max_size=4), "first": st.sampled_from("ab"), "second": st.sampled_from("bc")}
    | {"vote": st.sampled_from([*blind.CHOICES, "x", 1, None])}
)
LINES = st.lists(st.one_of(VOTE.map(json.dumps), st.text(max_size=20), st.just("[]"), st.just("")))


def read_or_error(path):
    try:
        return blind.read(path)
    except UserError as error:
        return error


@given(LINES)
@example(['{"pair": "p", "first": "a", "second": "b", "vote": "first"}'] * 2)
@example(["[" * 100_000])
@example(['{"pair": "p", "first": "a", "second": "b", "vote": ["first"]}'])
def test_any_file_is_votes_or_a_clear_error(tmp_path_factory, written):
    path = tmp_path_factory.mktemp("votes") / "votes.jsonl"
    path.write_text("\n".join(written), "utf-8", errors="surrogatepass")
    votes = read_or_error(path)
    if isinstance(votes, UserError):
        assert "Fix:" in str(votes)
        assert "\n" not in str(votes)
        return
    assert len({vote.pair for vote in votes}) == len(votes)
    for result in blind.results(RunFolder(path.parent)):
        assert result.wins + result.losses + result.ties + result.skipped <= len(votes)
        assert result.b in str(result)


def test_votes_on_other_models_do_not_count(run):
    Ballot(ENTRIES, "base", "exp1", run).vote("first")
    other = Ballot([{**entry, "exp2": "x"} for entry in ENTRIES], "exp1", "exp2", run).vote("tie")
    assert (other.result.ties, other.result.decided) == (1, 0)
    assert [(result.a, result.b) for result in blind.results(run)] == [("base", "exp1"), ("exp1", "exp2")]
