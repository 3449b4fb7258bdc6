"""Tell stories about people whose names are two tokens, which must be repeated consistently.

Gloeckle et al. 2024, "Better & faster large language models via multi-token prediction" (arXiv
2404.19737), section 4.1: names in children's stories are replaced by random names of two tokens,
and the accuracy on the second token of names mentioned before measures induction. Here the stories
are made from templates, and only these tokens are trained and asked for. The second tokens of new
names are given: otherwise a model that ends all names alike would tell consistent stories.

    > A3 b7 had a ball . at the lake A5 b2 found a cake . A3 b7 saw A5 b2 .
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from data_modules.tasks.base import Example, Task, log_bucket, option
from mtp_lightning.errors import UserError

BEGIN, FIRST = 1, 2
FILLERS = {
    "PLACE": ("lake", "school", "garden", "forest", "market", "house"),
    "THING": ("ball", "cake", "kite", "book", "shell", "lamp"),
}
TEMPLATES = (
    "NAME ENDING went to the PLACE .",
    "NAME ENDING saw NAME ENDING .",
    "NAME ENDING had a THING .",
    "NAME ENDING gave NAME ENDING the THING .",
    "then NAME ENDING and NAME ENDING were happy .",
    "at the PLACE NAME ENDING found a THING .",
    "NAME ENDING asked NAME ENDING for a THING .",
    "hello , said NAME ENDING to NAME ENDING .",
)
SENTENCES = tuple(tuple(template.split()) for template in TEMPLATES)
SLOTS = ("NAME", "ENDING", *FILLERS)
KINDS = {
    **{word: word for sentence in SENTENCES for word in sentence if word not in SLOTS},
    **{word: kind for kind, words in FILLERS.items() for word in words},
}
"""Every word, and its kind in a template."""
ID = {word: FIRST + i for i, word in enumerate(KINDS)}
NAMES = FIRST + len(KINDS)
"""Id of the first beginning of a name."""


@dataclass(frozen=True, kw_only=True)
class Induction(Task):
    """Stories of ``sentences`` sentences about ``names`` people, drawn for each story.

    Attributes:
        sentences: sentences of a story; more than ``names``, so that some name is repeated.
        names: people of a story, >= 2; their names begin differently and may end alike.
        beginnings: number of different first tokens of names, >= ``names``.
        endings: number of different second tokens of names, >= 1.
    """

    name = "induction"
    longest_prompt = 1

    sentences: int = option(8, least=1)
    names: int = option(3, least=2)
    beginnings: int = option(32, least=1)
    endings: int = option(32, least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sentences <= self.names:
            raise UserError(
                f"data.task.sentences={self.sentences} may not repeat any of data.task.names="
                f"{self.names} names: ask for more sentences than names."
            )
        self.require_enough("beginnings", of="names")

    @cached_property
    def symbols(self) -> tuple[str, ...]:
        beginnings = (f"A{i}" for i in range(self.beginnings))
        endings = (f"b{i}" for i in range(self.endings))
        return ("_", ">", *KINDS, *beginnings, *endings)

    @property
    def longest_answer(self) -> int:
        return self.sentences * max(map(len, SENTENCES))

    @cached_property
    def chance(self) -> float:
        """Exact match of repeating the ending of a random earlier name, over 1,024 stories."""
        total = 0.0
        for i in range(1024):
            example = self.example(i)
            p = 1.0
            ending_of: dict[int, int] = {}
            pairs = zip(pairwise(example.answer), example.asked[1:], strict=True)
            for (token, following), is_asked in pairs:
                if is_asked:  # names may end alike
                    endings = [*ending_of.values()]
                    p *= endings.count(following) / len(endings)
                if self._begins(token):
                    ending_of[token] = following
            total += p
        return total / 1024

    def example(self, index: int) -> Example:
        draws = self.draws(index)
        beginnings = draws.permutation(self.beginnings)[: self.names]
        endings = draws.many_below(self.endings, self.names)
        story: list[int] = []
        given: list[bool] = []
        mentioned: set[int] = set()
        for _ in range(self.sentences):
            people = draws.permutation(self.names)
            for word in SENTENCES[draws.below(len(SENTENCES))]:
                given.append(word != "ENDING")
                if word == "NAME":
                    person = people.pop()
                    story.append(NAMES + beginnings[person])
                elif word == "ENDING":
                    story.append(NAMES + self.beginnings + endings[person])
                    given[-1] = person not in mentioned
                    mentioned.add(person)
                elif word in FILLERS:
                    words = FILLERS[word]
                    story.append(ID[words[draws.below(len(words))]])
                else:
                    story.append(ID[word])
        return Example([BEGIN], story, given)

    def check(self, prompt: Sequence[int], answer: Sequence[int]) -> bool:
        """Whether it is a story in which each name always has the same ending."""
        if any(not FIRST <= token < len(self.symbols) for token in answer):
            return False
        sentences: list[list[str]] = [[]]
        for token in answer:
            sentences[-1].append(self._kinds[token - FIRST])
            if token == ID["."]:
                sentences.append([])
        *ended, rest = map(tuple, sentences)
        ends: dict[int, int] = {}
        consistent = all(ends.setdefault(a, b) == b for a, b in pairwise(answer) if self._begins(a))
        complete = not rest and len(ended) == self.sentences
        return consistent and complete and set(ended) <= set(SENTENCES)

    def variants(self) -> dict[str, Task]:
        """Twice as many sentences."""
        return {"longer": replace(self, sentences=2 * self.sentences)}

    def groups(self, example: Example) -> Sequence[str]:
        """The distance in tokens to the previous mention of the name."""
        names, last = [""], dict[int, int]()
        for i, (token, is_asked) in enumerate(zip(example.answer, example.asked[1:], strict=False)):
            names.append(f"distance_{log_bucket(i - last[token])}" if is_asked else "")
            last[token] = i
        return names

    def _begins(self, token: int) -> bool:
        return NAMES <= token < NAMES + self.beginnings

    @cached_property
    def _kinds(self) -> list[str]:
        """The kind of every id from :data:`FIRST` on."""
        return [*KINDS.values(), *["NAME"] * self.beginnings, *["ENDING"] * self.endings]
