"""The stories of the induction task, parsed from their text."""

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
def test_repeated_names_are_asked_and_keep_their_endings(task: Induction) -> None:
    templates = set()
    for i in range(400):
        example = task.example(i)
        story = task.show(example.answer)
        sentences = [sentence.strip() + " ." for sentence in story.split(".")[:-1]]
        assert len(sentences) == task.sentences
        templates.update(re.sub(r"[Ab]\d+", "", sentence) for sentence in sentences)
        for sentence in sentences:
            assert SENTENCE.fullmatch(sentence)
            people = [name[0] for name in NAME.findall(sentence)]
            assert len(set(people)) == len(people), "nobody meets themselves"
        mentions = NAME.findall(story)
        assert len(set(mentions)) == len({a for a, _ in mentions}) <= task.names
        assert len(mentions) > len(set(mentions)), "some name is repeated"
        # Asked are the second tokens of mentions after the first, grouped by the distance to the
        # previous mention.
        words = story.split()
        places = [j for j, word in enumerate(words) if re.fullmatch(r"b\d+", word)]
        back = {
            j: next((j - i for i in reversed(places[:n]) if words[i - 1] == words[j - 1]), None)
            for n, j in enumerate(places)
        }
        asked = [j for j, asked in enumerate(example.asked) if asked]
        assert asked == [j for j in places if back[j]]
        groups = task.groups(example)
        assert [j for j, group in enumerate(groups) if group] == asked
        for j in asked:
            least, *most = (int(n) for n in groups[j].removeprefix("distance_").split("-"))
            assert least <= back[j] <= (most or [least])[0]
    assert len(templates) > 20


def test_another_ending_of_a_repeated_name_is_wrong() -> None:
    task = Induction()
    for i in range(500):
        example = task.example(i)
        asked = [j for j, asked in enumerate(example.asked) if asked]
        ending = max(example.answer[j] for j in asked)
        other = ending + 1 if ending + 1 < len(task.symbols) else ending - 1
        place = asked[i % len(asked)]
        changed = [other if j == place else token for j, token in enumerate(example.answer)]
        assert task.check(example.prompt, example.answer)
        assert task.check(example.prompt, changed) == (changed == example.answer)


def test_stories_without_a_token_a_sentence_or_an_end_are_wrong() -> None:
    task = Induction(sentences=4)
    for i in range(60):
        example = task.example(i)
        for j in range(len(example.answer)):
            cut = example.answer[:j] + example.answer[j + 1 :]
            assert not task.check(example.prompt, cut)
        assert not task.check(example.prompt, example.answer * 2)
        period = example.answer.index(example.answer[-1]) + 1
        assert not task.check(example.prompt, example.answer[period:])


@pytest.mark.parametrize("endings", [32, 2, 1])
def test_chance_is_that_of_the_ending_of_an_earlier_name(endings: int) -> None:
    task = Induction(endings=endings)
    total = 0.0
    for i in range(1024):
        mentions = NAME.findall(task.show(task.example(i).answer))
        p = 1.0
        for j, (name, ending) in enumerate(mentions):
            earlier = sorted(set(mentions[:j]))
            if name in dict(earlier):
                p *= sum(other == ending for _, other in earlier) / len(earlier)
        total += p
    assert task.chance == pytest.approx(total / 1024)
    assert (task.chance == 1) == (endings == 1)
