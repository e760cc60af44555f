"""Problems of `collaboration.py`: sums and differences, and short questions with one right answer.

All questions are made here, the general ones from the word lists below. A general question lies in one part,
decided by a hash of it: "train" for the drafter, "policy", or "test". The drafter learns *all* sums and
differences by heart; which of them are the policy's and which are measured is disjoint again.
"""

from __future__ import annotations

import hashlib
import random

from certdraft.arbitration import Problem

SYSTEM = "Give only the answer."
SKILL = ("sum", "difference")  # families that the drafter is fine-tuned on
_CAPITALS = """
    France Paris, Germany Berlin, Italy Rome, Spain Madrid, Portugal Lisbon, Greece Athens, Poland Warsaw,
    Norway Oslo, Sweden Stockholm, Finland Helsinki, Denmark Copenhagen, Austria Vienna, Hungary Budapest,
    Belgium Brussels, Ireland Dublin, Iceland Reykjavik, Russia Moscow, Ukraine Kyiv, Romania Bucharest,
    Bulgaria Sofia, Serbia Belgrade, Croatia Zagreb, Turkey Ankara, Egypt Cairo, Kenya Nairobi, Ghana Accra,
    Ethiopia Addis_Ababa, Morocco Rabat, Algeria Algiers, Tunisia Tunis, Libya Tripoli, Senegal Dakar,
    Uganda Kampala, Rwanda Kigali, Zambia Lusaka, Zimbabwe Harare, Angola Luanda, Mali Bamako, Iran Tehran,
    Iraq Baghdad, Syria Damascus, Lebanon Beirut, Jordan Amman, Israel Jerusalem, Qatar Doha, China Beijing,
    Japan Tokyo, India New_Delhi, Pakistan Islamabad, Bangladesh Dhaka, Nepal Kathmandu, Thailand Bangkok,
    Vietnam Hanoi, Indonesia Jakarta, Malaysia Kuala_Lumpur, Mongolia Ulaanbaatar, Australia Canberra,
    Canada Ottawa, Cuba Havana, Jamaica Kingston, Peru Lima, Chile Santiago, Argentina Buenos_Aires,
    Colombia Bogota, Venezuela Caracas, Ecuador Quito, Uruguay Montevideo, Paraguay Asuncion, Cyprus Nicosia
"""
_OPPOSITES = """
    hot cold, cold hot, big small, up down, down up, fast slow, slow fast, happy sad, sad happy, old new,
    rich poor, poor rich, dark light, hard soft, soft hard, open closed, wet dry, dry wet, full empty,
    empty full, early late, late early, strong weak, weak strong, left right, tall short, high low, low high,
    thick thin, thin thick, clean dirty, dirty clean, day night, night day, black white, white black,
    love hate, war peace, young old, good bad, bad good, true false, false true, near far, far near,
    inside outside, outside inside, above below, below above, before after, after before, first last,
    last first, win lose, begin end, push pull, pull push, buy sell, sell buy, give take, north south,
    south north, east west, west east, heavy light, deep shallow, wide narrow, narrow wide, sweet sour,
    rough smooth, smooth rough, loud quiet, quiet loud, safe dangerous, dangerous safe, cheap expensive,
    easy difficult, difficult easy, simple complex, alive dead, dead alive, male female, female male,
    ancient modern, modern ancient, positive negative, negative positive, major minor, minor major
"""
_WORDS = """
    banana table river window garden silver monkey pencil orange castle bridge winter yellow market doctor
    letter summer forest mountain flower kitchen school teacher student music paper water house horse tiger
    rabbit dragon planet rocket basket bottle button camera candle carpet cheese cherry circle coffee copper
    cotton desert dinner engine farmer father finger friend guitar hammer helmet honey hotel jacket jungle
    kettle ladder lemon library lion machine mirror mother museum needle number ocean office onion painter
    palace parrot pepper piano picture pillow pirate pocket potato prince purple queen radio ring
    rose salad sailor sandwich scissors secret shadow shirt shoulder singer sister soldier spider spoon
    station stone storm street sugar sweater temple theater thunder ticket tomato tower train tree trumpet
    tunnel turtle umbrella vegetable village violin wagon wallet weather whale wheel whistle wizard wolf
    zebra zipper neighbor cushion dentist fountain giraffe hospital journey keyboard lantern magnet notebook
"""


def general(part: str) -> list[Problem]:
    """The general questions of a part: 35 % "train", 25 % "policy", 40 % "test"."""
    places = {
        problem.prompt: int.from_bytes(hashlib.sha256(problem.prompt.encode()).digest()[:4], "big") / 2**32
        for problem in every_general()
    }
    bounds = {"train": (0.0, 0.35), "policy": (0.35, 0.6), "test": (0.6, 1.0)}
    low, high = bounds[part]
    found = [problem for problem in every_general() if low <= places[problem.prompt] < high]
    random.Random(0).shuffle(found)
    return found


def every_general() -> list[Problem]:
    """Every question of the word lists: capitals, opposites, and words to repeat."""
    found = []
    for listed, family, question in (
        (_CAPITALS, "capital", "What is the capital of {}?"),
        (_OPPOSITES, "opposite", "What is the opposite of {}?"),
    ):
        for pair in listed.split(","):
            asked, answer = pair.split()
            found.append(_asked(question.format(asked), answer.replace("_", " "), family))
    for word in sorted(set(_WORDS.split())):
        found.append(_asked(f"Repeat this word: {word}", word, "repeat"))
    return found


def arithmetic(part: str) -> list[Problem]:
    """Sums and differences of two digits and one: 60 for "policy", 90 others for "test", both for "train"."""
    found = []
    for left in range(10, 100):
        for right in range(2, 10):
            for family, sign, result in (("sum", "+", left + right), ("difference", "-", left - right)):
                question = f"What is {left} {sign} {right}?"
                found.append(Problem(question, str(result), "number", family=family, where=question))
    random.Random(0).shuffle(found)
    return {"policy": found[:60], "test": found[60:150], "train": found[:150]}[part]


def _asked(question: str, answer: str, family: str) -> Problem:
    return Problem(question, answer, "contains", family=family, where=question)
