"""Metrics and generators of the quality benchmark: no model, no data folder."""

import json
import math
import re

import pytest

from benchmarks import common, outputs, quality
from benchmarks.suites import draw, source
from benchmarks.suites.agent import Episode, agent
from benchmarks.suites.airline import compare, plain, signatures
from benchmarks.suites.babi import stories
from benchmarks.suites.errands import Script
from benchmarks.suites.language import agreement, divergence
from benchmarks.suites.longbench import classification, edit_similarity, judge, numbers, qa_f1, rouge_l
from benchmarks.suites.mmlu import mmlu
from benchmarks.suites.needle import digits_right, exact, needle
from benchmarks.suites.pins import pins
from benchmarks.suites.retrieval import generated, recorded
from benchmarks.suites.sample import Sample, ask
from benchmarks.suites.tracking import tracking
from benchmarks.suites.world import World


class Characters:
    """A tokenizer whose tokens are characters, with a chat format of its own."""

    def __call__(self, text, add_special_tokens=True):
        return type("Encoding", (), {"input_ids": [ord(c) for c in text]})

    def decode(self, tokens):
        return "".join(map(chr, tokens))

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return "".join(f"<{m['role']}>{m['content']}\n" for m in messages) + "<assistant>"


class Words(Characters):
    """The same, but a letter with the space before it is one token."""

    def __call__(self, text, add_special_tokens=True):
        ids = [1000 + ord(text[1])] if len(text) == 2 and text[0] == " " else [ord(c) for c in text]
        return type("Encoding", (), {"input_ids": ids})


@pytest.fixture
def novels(tmp_path):
    """A source with a book for every split; a sentence of it is 26 characters long."""
    (tmp_path / "books").mkdir()
    for name, word in (("war_and_peace", "train"), ("dracula", "valid"), ("pride", "final")):
        text = " ".join(f"A {word} book, sentence {i:05}." for i in range(2000))
        book = f"Licence\n*** START OF THIS BOOK ***\n{text}\n*** END OF THIS BOOK ***\nLicence"
        (tmp_path / "books" / f"{name}.txt").write_text(book)
    return lambda context: source.Source(Characters(), tmp_path, context)


def read(sample, outputs=()):
    return Characters().decode(sample.prompt(list(outputs)))


def test_splits_share_nothing():
    items = list(range(103))
    parts = [set(source.take_split(items, seed)) for seed in (0, 1000, 2000)]
    assert set.union(*parts) == set(items) and sum(map(len, parts)) == len(items)
    assert [source.split_of(seed) for seed in (999, 1000, 1999, 2000)] == [
        "training", "validation", "validation", "reported",
    ]  # fmt: skip
    assert source.pick(items, 2001) == 3 and source.pick(items, 2900) is None


@pytest.mark.parametrize("seed,word", [(7, "train"), (1007, "valid"), (2007, "final")])
def test_a_split_reads_its_own_books_without_their_licence(novels, seed, word):
    filler = Characters().decode(novels(500).filler(seed, 60000))
    assert len(filler) == 60000 and f"A {word} book" in filler and "Licence" not in filler
    assert sum(f"A {other} book" in filler for other in ("train", "valid", "final")) == 1


@pytest.mark.parametrize("suite", [needle, tracking, lambda s, seed: generated(s, seed, pairs=4)])
def test_prompts_are_exact_and_reproducible(novels, suite):
    first, again, other = suite(novels(3000), 2000), suite(novels(3000), 2000), suite(novels(3000), 2001)
    assert read(first) == read(again) != read(other)
    assert 2800 < len(first.prompt([])) + first.max_tokens <= 3000


def test_needles_stand_between_sentences_and_only_the_right_one_scores(novels):
    sample = needle(novels(4000), 2000, keys=4)
    text = read(sample)
    hidden = dict(re.findall(r"\. The special magic number for (\w+) is (\d{7})\.", text))
    asked = re.search(r"for (\w+) is$", text).group(1)
    assert len(hidden) == 4
    for key, number in hidden.items():
        assert sample.score([{"text": f" {number}."}], [])[""] == float(key == asked)


def test_depth_sweep_puts_the_needle_where_it_says(novels):
    for seed, share in ((2004, 0.0), (2007, 0.6), (2009, 1.0)):
        sample = needle(novels(5000), seed, sweep=True)
        at = read(sample).index(" The special magic number for") / 5000
        assert at == pytest.approx(share, abs=0.06)
        assert sample.score([{"text": "no"}], []) == {"": 0, "digits": 0, f"depth {share:.1f}": 0}


def test_many_questions_share_their_context(novels):
    sample = needle(novels(4000), 2000, keys=4, questions=4)
    prompts = [read(sample, [{}] * i).rsplit("\n\n", 1) for i in range(4)]
    assert len({context for context, _ in prompts}) == 1 and len({question for _, question in prompts}) == 4
    assert sample.prompt([{}] * 4) is None


def test_several_recorded_values_are_asked_for_on_one_context(novels):
    source = novels(3000)
    pairs = [(f"key {i:03}", f"value {i:03}") for i in range(200)]
    lines = [{"key": key, "value": value, "ordered_kv_records": pairs} for key, value in pairs[:20]]
    (source.data / "kv_retrieval.jsonl").write_text("\n".join(map(json.dumps, lines)))
    one, many = recorded(source, 2000), recorded(source, 2000, questions=3)
    contexts, keys = zip(*(read(many, [{}] * i).split('\n\nKey: "') for i in range(3)), strict=True)
    assert {*contexts} == {read(one).split('\n\nKey: "')[0]} == {Characters().decode(many.prompt([])[: many.shared])}
    asked = [key.split('"')[0] for key in keys]
    assert len({*asked}) == 3 and all(f'"{key}": "' in contexts[0] for key in asked) and one.shared == 0
    texts = [{"text": key.replace("key", "value") + '"}'} for key in asked[:2]] + [{"text": "value 999"}]
    parts = many.score(texts, [])
    assert parts.pop("") == pytest.approx(2 / 3) and many.prompt([{}] * 3) is None
    keys = re.findall(r'"(key \d+)"', contexts[0])
    late = [keys.index(key) * 2 // len(keys) for key in asked]
    assert parts == {f"half {half + 1}": sum(x == half for x in late[:2]) / late.count(half) for half in {*late}}


def test_a_pinned_number_comes_before_all_its_imitations(novels):
    sample = pins(novels(4000), 2000)
    text = read(sample)
    ((name, number),) = re.findall(r" The special magic number for (\w+) is (\d{5})\.", text)
    others = re.findall(r" Remember that the number of day \d+ was (\d{5})\.", text)
    assert len({number, *others}) == 13 and text.index(number) < min(map(text.index, others))
    assert text.endswith(f"The special magic number for {name} is")
    assert read(sample, [{}]) == text and sample.prompt([{}, {}]) is None
    assert sample.pinned == (f" {number}", None) and text.count(number) == 1
    outputs = [{"text": f" {number}."}, {"text": f" {others[0]}."}]
    assert sample.score(outputs, []) == {"": 1.0, "unpinned": 0.0}


def test_multiple_choice_questions_are_not_padded(tmp_path):
    def line(subject, i):
        return json.dumps({"subject": subject, "question": f"{subject} {i}?", "answer": i % 4} | choices)

    choices = {f"choice{i}": f"option {i}" for i in range(4)}
    (tmp_path / "mmlu").mkdir()
    (tmp_path / "mmlu" / "dev.jsonl").write_text("\n".join(line(s, i) for s in ("law", "art") for i in range(6)))
    (tmp_path / "mmlu" / "test.jsonl").write_text("\n".join(line("law", i) for i in range(100, 108)))
    short, long = (source.Source(Words(), tmp_path, context) for context in (2000, 9000))
    sample = mmlu(short, 2000)
    assert sample.prompt([]) == mmlu(long, 2000).prompt([])
    text = read(sample)
    assert text.count("Answer:") == 6 and text.endswith(
        "law 102?\nA. option 0\nB. option 1\nC. option 2\nD. option 3\nAnswer:"
    )
    assert "art" not in text
    assert [sample.score([{"choice": choice}], []) for choice in sample.choices] == [{"": c == 2} for c in range(4)]
    with pytest.raises(ValueError, match="too short"):
        mmlu(source.Source(Words(), tmp_path, 100), 2000)


def test_tracking_hands_values_on_in_order(novels):
    sample = tracking(novels(4000), 2003, chains=2, hops=2)
    text = read(sample)
    values = dict(re.findall(r"number for (\w+) is the number (\d{7})\.", text))
    links = dict(re.findall(r"number for (\w+) is that of (\w+)\.", text))
    assert len(values) == 2 and len(links) == 4
    name = re.search(r"number for (\w+)\?", text).group(1)
    walk = []
    while name in links:
        assert text.index(f"for {name} is that of") > text.index(f"for {links[name]} is")
        assert read(sample, walk).endswith(f" The special magic number for {name} is that of")
        name = links[name]
        walk.append({"text": f" {name}.\n"})
    assert read(sample, walk).endswith(f" for {name} is the number") and len(sample.prompt(walk)) <= 4000 - 12
    answered = [*walk, {"text": f" {values[name]}"}]
    assert sample.score(answered, []) == {"": 1.0} and sample.prompt(answered) is None
    assert sample.score([{"text": " nobody"}, *answered[1:]], []) == {"": 0.0}
    assert len(sample.prompt([{"text": "x" * 12}] * 2)) <= 4000 - 12


def test_a_context_too_short_is_refused(novels):
    with pytest.raises(ValueError, match="too short"):
        needle(novels(100), 2000)
    with pytest.raises(ValueError, match="too short"):
        agent(novels(1000), 2000, turns=30)


def test_missing_data_is_named(novels):
    with pytest.raises(ValueError, match="mmlu/test.jsonl"):
        draw("mmlu", novels(1000), 2000, 2)


def test_babi_stories(tmp_path):
    path = tmp_path / "qa1.txt"
    path.write_text(
        "1 Ann went to the hall.\n2 Bob took milk.\n3 Where is Ann? \thall\t1\n4 Bob left.\n5 Where? \tx\t1\n"
        "1 Eve sat.\n2 Where is Eve? |chair|1\n"
    )
    assert stories(path) == [
        (["Ann went to the hall.", "Bob took milk."], "Where is Ann?", "hall"),
        (["Eve sat."], "Where is Eve?", "chair"),
    ]


def test_number_metrics():
    assert exact(" 1234567.\n", "1234567") == 1 and exact("12345678", "1234567") == 0 and exact("", "1") == 0
    assert digits_right("1234067", "1234567") == pytest.approx(6 / 7) and digits_right("none", "12") == 0
    assert numbers("Paragraph 3 or 4", "Paragraph 3") == 0.5 and numbers("no idea", "7") == 0


def test_text_metrics():
    assert qa_f1("The cat, sat!", "cat sat") == 1
    assert qa_f1("a dog ran", "dog walked") == pytest.approx(0.5)
    assert qa_f1("财政总收入", "财政收入") == pytest.approx(8 / 9)
    assert rouge_l("one two three four", "one three four five") == pytest.approx(0.75)
    assert rouge_l("", "word") == 0
    assert edit_similarity("# note\nreturn x", "return y") == pytest.approx(7 / 8)
    classes = ["date", "other date", "place"]
    assert classification("a date", "other date", classes) == 0
    assert classification("other date", "other date", classes) == 1
    assert classification("place or date", "place", classes) == 0.5


def test_longbench_takes_the_best_gold_answer_and_the_first_line_of_few_shot_answers():
    assert judge("hotpotqa", "Bob Dylan", ["someone", "Bob Dylan"]) == 1
    gold = {"answers": ["Date"], "all_classes": ["Date", "Place"]}
    assert judge("trec", "\nDate\nQuestion: x\nType: Place", gold) == 1


def test_divergence_is_zero_for_equal_and_bounded_by_the_true_one():
    logs = lambda *ps: [math.log(p) for p in ps]  # noqa: E731
    full = ([1, 2, 3], logs(0.5, 0.3, 0.1))
    assert divergence(full, full) == 0
    true = 0.5 * math.log(0.5 / 0.4) + 0.3 * math.log(0.3 / 0.2) + 0.1 * math.log(0.1 / 0.3)
    assert 0 < divergence(full, ([1, 3, 2], logs(0.4, 0.3, 0.2))) <= true + 1e-9
    both = [{"nll": [1.0, 3.0], "top": [full, full]}]
    assert agreement(both, both) == {"perplexity": 2.0, "kl": 0.0, "top1": 1.0}
    assert quality.summary("perplexity")([2.0, 2.0]) == pytest.approx(math.e**2)


@pytest.mark.parametrize(
    "line",
    ["", "vases", 'set_item("vases")', 'set_item("vases", "4")', 'remove_item("vases")', "open('x', 'w')",
     'write_file("a" * 9, "b")', "(" * 500, 'set_item("a", 1); 2', "lambda: 0"],
)  # fmt: skip
def test_the_world_refuses_what_is_not_a_call(line):
    world = World()
    assert world.call(line).startswith("error") and world == World()


def test_the_world_changes_as_told():
    world = World()
    for line in (
        'set_item("vases", 4)', 'add_event("May 14", "dentist")', 'write_file(name="a.txt", text="x")',
        'set_item("lamps", 2)', 'remove_item("lamps")',
    ):  # fmt: skip
        assert world.call(line) == "ok"
    assert world == World({"vases": 4}, {"dentist": "May 14"}, {"a.txt": "x"})


@pytest.mark.parametrize("turns", [10, 30, 100])
def test_every_errand_can_be_done_from_what_was_said_before(turns):
    for seed in range(2000, 2010):
        world, said = World(), ""
        for errand in Script(seed).errands(turns):
            said += errand.fact + errand.text
            before = world.copy()
            assert world.call(errand.call) == "ok" and world != before
            value = errand.call.split('"')[3 if "write" in errand.call else 1]
            assert errand.call.startswith("set_item") or value in said


def test_the_agent_is_judged_by_the_state(novels):
    sample = agent(novels(9000), 2000, turns=10)
    episode = Episode(novels(9000), 2000, 10)
    right = [{"text": f" {errand.call}\nmore"} for errand in episode.errands]
    assert sample.score(right, []) == {"": 1.0, "direct": 1.0, "recall": 1.0}
    assert sample.score(right[:5], [])[""] == 0.5
    extra = [*right[:-1], {"text": 'set_item("something else", 1)'}]
    assert sample.score(extra, [])[""] == 0.9
    lengths = [len(sample.prompt(right[:i])) for i in range(10)]
    assert lengths == sorted(lengths) and 8000 < lengths[-1] < 9000 and sample.prompt(right) is None
    assert f"{episode.errands[3].call}\n<user>[ok]" in read(sample, right[:4])


def test_recorded_calls_are_compared_by_value():
    function = {"name": "find", "arguments": '{"id": "A1", "n": 2}'}
    assert compare('find", "arguments": {"n": 2, "id": "A1"}}</tool_call>', function) == {"": 1, "name": 1}
    assert compare('find", "arguments": {"id": "A2", "n": 2}}', function) == {"": 0, "name": 1}
    assert compare('book", "argu', function) == {"": 0, "name": 0}
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}
    assert plain(call)["content"].startswith('<tool_call>{"name": "find", "arguments": {"id"')
    assert signatures([{"traj": [call]}]) == "- find(id, n)"


def test_paired_interval():
    assert common.paired_interval([1.0, 0.0, 1.0], [1.0, 0.0, 1.0]) == [0.0, 0.0]
    low, high = common.paired_interval([0.0] * 10 + [1.0] * 10, [1.0] * 20)
    assert -0.75 <= low < -0.5 < high <= -0.25


def test_outputs_are_kept_until_the_prompt_changes(tmp_path):
    path = tmp_path / "suite.jsonl"
    sample = Sample(5, ask([1, 2]), lambda *_: {})
    assert outputs.kept(path, [sample]) == {}
    outputs.keep(path, sample, [{"text": "x"}])
    assert outputs.kept(path, [sample]) == {5: [{"text": "x"}]}
    assert outputs.kept(path, [Sample(5, ask([1, 3]), lambda *_: {})]) == {}


def test_rows_pair_every_part_with_full_attention():
    sample = lambda seed: Sample(seed, ask([0] * 9), lambda o, f: {"": o[0], f"half {seed % 2}": o[0]})  # noqa: E731
    rows = quality.rows("toy", [sample(1), sample(2)], {1: [1.0], 2: [1.0]}, {1: [0.0], 2: [1.0]})
    assert [(r["suite"], r["n"], r["score"], r["full_score"]) for r in rows] == [
        ("toy", 2, 0.5, 1.0), ("toy/half 0", 1, 1.0, 1.0), ("toy/half 1", 1, 0.0, 1.0),
    ]  # fmt: skip
    assert rows[2]["ci95"] == [-1.0, -1.0] and rows[0]["prompt_tokens"] == 9
