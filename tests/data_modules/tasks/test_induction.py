"""Stories, read as people read them."""

from __future__ import annotations

import re

import pytest

from data_modules.tasks import Induction
from data_modules.tasks.induction import FILLERS, TEMPLATES

NAME = re.compile(r"(A\d+) (b\d+)")
SENTENCE = re.compile(
    "|".join(
        template.replace("NAME ENDING", r"A\d+ b\d+")
        .replace("PLACE", f"(?:{'|'.join(FILLERS['PLACE'])})")
        .replace("THING", f"(?:{'|'.join(FILLERS['THING'])})")
        .replace(".", r"\.")
        for template in TEMPLATES
    )
)


@pytest.mark.parametrize("task", [Induction(), Induction(sentences=5, names=4, endings=2)])
def test_names_are_asked_and_always_the_same(task: Induction) -> None:
    used = set()
    for i in range(2000):
        example = task.example(i)
        story = task.show(example.answer)
        sentences = [sentence.strip() + " ." for sentence in story.split(".")[:-1]]
        assert len(sentences) == task.sentences
        used.update(re.sub(r"[Ab]\d+", "", sentence) for sentence in sentences)
        for sentence in sentences:
            assert SENTENCE.fullmatch(sentence)
            people = [name[0] for name in NAME.findall(sentence)]
            assert len(set(people)) == len(people), "nobody meets themselves"
        mentions = NAME.findall(story)
        assert len(set(mentions)) == len({a for a, _ in mentions}) <= task.names
        assert len(mentions) > len(set(mentions)), "some name is repeated"
        # Asked are the second tokens of all mentions, and grouped by whether there was one before.
        asked = [story.split()[j] for j, asked in enumerate(example.asked) if asked]
        assert asked == [ending for _, ending in mentions]
        groups = [name for name in task.groups(example) if name]
        new = [mentions.index(mention) == j for j, mention in enumerate(mentions)]
        assert groups == ["first" if n else "repeat" for n in new]
        assert [bool(name) for name in task.groups(example)] == example.asked
    assert len(used) > 20


def test_repeats_are_judged_by_what_was_said_first() -> None:
    task = Induction()
    for i in range(500):
        example = task.example(i)
        asked = [j for j, asked in enumerate(example.asked) if asked]
        ending = max(example.answer[j] for j in asked)
        other = ending + 1 if ending + 1 < len(task.symbols) else ending - 1
        one = asked[i % len(asked)]
        before = example.answer[one - 1]
        same = [j for j in asked if example.answer[j - 1] == before]
        # Another name for one person throughout is as good; another one once is not.
        everywhere = [other if j in same else token for j, token in enumerate(example.answer)]
        assert task.check(example.prompt, everywhere)
        once = [other if j == one else token for j, token in enumerate(example.answer)]
        wrong = once != example.answer and len(same) > 1
        assert task.check(example.prompt, once) == (not wrong)


def test_what_is_no_story_is_refused() -> None:
    task = Induction(sentences=4)
    for i in range(300):
        example = task.example(i)
        for j in range(len(example.answer)):
            cut = example.answer[:j] + example.answer[j + 1 :]
            assert not task.check(example.prompt, cut)
        assert not task.check(example.prompt, example.answer * 2)
        period = example.answer.index(example.answer[-1]) + 1
        assert not task.check(example.prompt, example.answer[period:])


def test_chance_is_that_of_the_names_so_far() -> None:
    task = Induction()
    total = 0.0
    for i in range(256):
        seen: list[str] = []
        p = 1.0
        for a, _ in NAME.findall(task.show(task.example(i).answer)):
            if a in seen:
                p /= len(set(seen))
            seen.append(a)
        total += p
    assert task.chance == pytest.approx(total / 256)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"names": 1}, "data.task.names must be a whole number of at least 2, not 1."),
        ({"names": 8}, "data.task.sentences=8 may not repeat any of data.task.names=8 names"),
        ({"beginnings": 2}, "data.task.beginnings=2 are too few for data.task.names=3"),
        ({"endings": 0}, "data.task.endings must be a whole number of at least 1, not 0."),
    ],
)
def test_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Induction(**options)
