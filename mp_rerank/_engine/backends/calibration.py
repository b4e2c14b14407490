"""Pairs that show a quantizer how large a network's activations get: questions, their answers, and other texts.

English prose on a few subjects, of one sentence and of several. A model for another language, or for code, gets its
ranges from these texts too: its user has to check how well it ranks in int8.
"""

from __future__ import annotations

__all__ = ["PAIRS"]

TEXTS = {
    "Why is the sky blue?": (
        "Sunlight is scattered by the molecules of the air, the more of it the shorter its waves are. "
        "Blue light therefore reaches the eye from every part of the sky, while red passes almost straight through; at "
        "sunset, when the path through the air is long, it is what is left."
    ),
    "how long to boil an egg": (
        "Lower the egg into boiling water: after six minutes the yolk is runny, after eight it is like jam, and after "
        "eleven it is firm. Put it in cold water at once, or it goes on cooking."
    ),
    "causes of the fall of the Western Roman Empire": (
        "Historians disagree on what ended Roman rule in the west in 476. Among the causes they name are civil wars, "
        "the loss of Africa's taxes to the Vandals, inflation, plague, and the settlement of armed peoples whom the "
        "state could neither pay nor drive out."
    ),
    "transistor amplifier with negative feedback": (
        "Feeding a part of the output back in opposition to the input lowers the gain of a transistor amplifier and "
        "makes it steadier: distortion, noise of the later stages and the dependence on temperature fall by the same "
        "factor. At high frequencies the phase shift of each stage limits how much feedback is stable."
    ),
    "Does aspirin reduce the risk of heart attack?": (
        "In a randomized trial of 22,071 physicians, 325 mg of aspirin every other day reduced the risk of a first "
        "myocardial infarction by 44 percent (p < 0.00001). Strokes and ulcers were slightly more frequent among those "
        "who took it."
    ),
    "How do I sort a dictionary by value in Python?": (
        "Use sorted(d.items(), key=lambda item: item[1]); it gives a list of pairs. Since Python 3.7 a dictionary "
        "keeps the order of insertion, so dict() of that list is sorted, too. For a few, heapq.nlargest is faster."
    ),
    "cheap flights to Lisbon in March": (
        "Fares to Lisbon are lowest from November to mid-March. Several low-cost airlines fly there daily from London, "
        "Paris and Berlin, from 29 euros one way with hand luggage only."
    ),
    "The right of withdrawal in distance contracts": (
        "Consumers may withdraw from a contract concluded at a distance within 14 days, without giving any reason. The "
        "period begins on the day on which the goods are received; the trader shall reimburse all payments, delivery "
        "included, not later than 14 days after being informed."
    ),
    "indexing and retrieval of documents in libraries": (
        "Subject headings assigned by hand are compared with words taken automatically from titles and abstracts. On a "
        "collection of 1,400 papers the simple words retrieved as well as the controlled vocabulary did, at a small "
        "part of its cost; recall and precision were inversely related throughout."
    ),
    "Who wrote the opera about a barber?": (
        "Rossini's The Barber of Seville was first performed in Rome in 1816, and was a failure on its first night."
    ),
}

_texts = list(TEXTS.values())
#: each question with its answer, with another's, and with several in one long text
PAIRS = [
    pair
    for i, (question, answer) in enumerate(TEXTS.items())
    for pair in (
        (question, answer),
        (question, _texts[i - 1]),
        (question, " ".join(_texts[(i + step) % len(_texts)] for step in (3, 0, 6))),
    )
]
