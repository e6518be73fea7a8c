"""Comparisons in their three written forms, turned into each other without loss, and how far two labelers agree.

A ranking ("D > C > A = B") of K answers is the form everything else comes from: it holds K(K-1)/2 pairs, each ordered
or tied. Written as pairs (chosen/rejected, `tie: true`) a comparison is one row a pair, which name the answers and the
comparison they are from, so that `join_pairs` can put it together again. Ratings are a ranking with distances. All are
rows that `rows.parse_rows` reads.

Source of the agreement: InstructGPT, arXiv 2203.02155, section 3.4: 72.6 % of pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from nurture.data.rows import Row, Turns, ranking_text
from nurture.errors import NurtureError

Ranking = Sequence[Sequence[int]]


def comparison_record(row: Row) -> dict[str, Any]:
    """Return a ranked row as a JSON object that it can be read from again."""
    record: dict[str, Any] = {
        "prompt": list(row.prompt or ()),
        "responses": [_plain(r) for r in row.responses],
    }
    record["ranking"] = ranking_text(row.ranking)
    if row.metadata.get("ratings"):
        record["ratings"] = list(row.metadata["ratings"])
    if row.template_kwargs:
        record["chat_template_kwargs"] = dict(row.template_kwargs)
    return record


def _plain(reply: Turns) -> Any:
    """Return a reply as a string where it is one ordinary turn of the assistant."""
    if len(reply) == 1 and set(reply[0]) <= {"role", "content"} and reply[0]["role"] == "assistant":
        return reply[0]["content"]
    return list(reply)


def join_pairs(rows: Iterable[Row], where: str = "the data") -> list[Row]:
    """Put pairs that say which comparison they are from together again; other rows stay as they are.

    Raises:
        NurtureError: the pairs of a comparison contradict each other, or some are missing; the message names the row.
    """
    joined: list[Row | None] = []
    places: dict[str, int] = {}
    members: dict[str, list[tuple[int, Row]]] = {}
    for number, row in enumerate(rows):
        name, pair = row.metadata.get("comparison"), row.metadata.get("pair")
        if name is None or pair is None or len(row.responses) != 2:
            joined.append(row)
            continue
        if str(name) not in places:
            places[str(name)] = len(joined)
            joined.append(None)
        members.setdefault(str(name), []).append((number, row))
    for name, pairs in members.items():
        joined[places[name]] = _join(pairs, f"{where}: comparison '{name}'")
    return [row for row in joined if row is not None]


def _join(pairs: Sequence[tuple[int, Row]], where: str) -> Row:
    responses: dict[str, Turns] = {}
    ratings: dict[str, float] = {}
    better: set[tuple[str, str]] = set()
    tied: set[frozenset[str]] = set()
    for number, row in pairs:
        letters = [part.strip() for part in str(row.metadata["pair"]).replace("=", ">").split(">")]
        if len(letters) != 2:
            raise NurtureError(
                f"{where}, row {number}: 'pair' must look like \"A > C\", got {row.metadata['pair']!r}"
            )
        for letter, reply, rating in zip(letters, row.responses, row.metadata.get("ratings") or (None, None)):
            if responses.setdefault(letter, reply) != reply:
                raise NurtureError(
                    f"{where}, row {number}: answer {letter} has another text than in an earlier row"
                )
            if rating is not None:
                ratings[letter] = rating
        if len(row.ranking) == 1:
            tied.add(frozenset(letters))
        else:
            better.add((letters[0], letters[1]))
    names = sorted(responses, key=lambda letter: (len(letter), letter))
    wins = {name: sum(pair[0] == name for pair in better) for name in names}
    places = sorted(set(wins.values()), reverse=True)
    ranking = tuple(tuple(i for i, name in enumerate(names) if wins[name] == won) for won in places)
    for first, second in combinations(names, 2):
        said = [(first, second) in better, (second, first) in better, frozenset((first, second)) in tied]
        if sum(said) == 0:
            raise NurtureError(
                f"{where}: no row compares {first} and {second}; every pair of answers needs one"
            )
        means = [wins[first] > wins[second], wins[first] < wins[second], wins[first] == wins[second]]
        if said != means:
            numbers = ", ".join(str(number) for number, _ in pairs)
            raise NurtureError(
                f"{where}: its pairs (rows {numbers}) contradict each other at {first} and {second}: no ranking"
            )
    row = pairs[0][1]
    kept = {k: v for k, v in row.metadata.items() if k not in ("pair", "ratings", "tie") and "score" not in k}
    if ratings:
        kept["ratings"] = tuple(ratings[name] for name in names)
    best = (*(row.prompt or ()), *responses[names[ranking[0][0]]])
    return Row(
        text="\n\n".join(turn.get("content") or "" for turn in best),
        messages=best,
        prompt=row.prompt,
        responses=tuple(responses[name] for name in names),
        ranking=ranking,
        template_kwargs=row.template_kwargs,
        metadata=kept,
    )


@dataclass(frozen=True)
class Agreement:
    """How far two labelers agree on the same answers.

    Attributes:
        ordered: share of the pairs that both ordered on which they say the same (InstructGPT's measure; chance 1/2).
        ordered_pairs: how many those are.
        all: share of all pairs on which they say the same, "tied" being a third thing to say.
        pairs: how many those are.
    """

    ordered: float
    ordered_pairs: int
    all: float
    pairs: int


def agreement(rankings: Iterable[tuple[Ranking, Ranking]]) -> Agreement:
    """Compare two labelers' rankings of the same comparisons, each given as (one's, the other's)."""
    same_ordered = ordered = same = pairs = 0
    for one, other in rankings:
        for first, second in _verdicts(one, other):
            pairs += 1
            same += first == second
            if first and second:
                ordered += 1
                same_ordered += first == second
    return Agreement(same_ordered / max(ordered, 1), ordered, same / max(pairs, 1), pairs)


def _verdicts(one: Ranking, other: Ranking) -> Iterator[tuple[int, int]]:
    """Yield for every pair of answers what each labeler says: 1 the first is better, -1 the second, 0 tied."""
    ranks = [{index: place for place, group in enumerate(r) for index in group} for r in (one, other)]
    for i, j in combinations(sorted(ranks[0]), 2):
        verdicts = [(rank[i] < rank[j]) - (rank[i] > rank[j]) for rank in ranks]
        yield verdicts[0], verdicts[1]
