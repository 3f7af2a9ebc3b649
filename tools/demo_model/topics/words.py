"""Lists of words that the topics fill into their phrasings."""

from __future__ import annotations

from random import Random

NAMES = (
    "Anna Ben Carla David Emma Felix Grace Henry Iris Jack Kira Liam Maria Noah Olivia Paul Quinn "
    "Rosa Sam Tina Uma Victor Wendy Xaver Yara Zoe Alice Bob Clara Daniel Eva Frank Gina Hugo Ida "
    "Jonas Karen Leo Mia Nina Oscar Petra Ralf Sofia Tom Ursula Vera Walter Lucy Max Julia Peter "
    "Laura Simon Helen George Nora Adam Diana Erik Fiona Ivan Jenny Kevin Linda Martin"
).split()
CITIES = (
    "Paris London Berlin Rome Madrid Tokyo Oslo Vienna Lisbon Dublin Prague Athens Cairo Delhi "
    "Boston Chicago Toronto Sydney Seoul Beijing Lima Nairobi Zurich Geneva Munich Hamburg Milan "
    "Naples Warsaw Budapest Helsinki Stockholm Copenhagen Amsterdam Brussels Moscow Istanbul Dubai "
    "Singapore Bangkok Hanoi Manila Denver Seattle Dallas Miami Atlanta Havana Bogota Santiago"
).split()
COUNTRIES = {
    "Paris": "France", "London": "England", "Berlin": "Germany", "Rome": "Italy", "Madrid": "Spain",
    "Tokyo": "Japan", "Oslo": "Norway", "Vienna": "Austria", "Lisbon": "Portugal",
    "Dublin": "Ireland", "Athens": "Greece", "Cairo": "Egypt", "Warsaw": "Poland",
    "Budapest": "Hungary", "Helsinki": "Finland", "Stockholm": "Sweden", "Seoul": "Korea",
}  # fmt: skip
ANIMALS = (
    "fox bear rabbit mouse owl cat dog horse frog turtle squirrel hedgehog lion elephant bird duck "
    "wolf deer fish bee goat sheep penguin whale tiger monkey"
).split()
COLORS = "red blue green yellow black white orange purple brown pink grey silver golden".split()
THINGS = (
    "apple book lamp chair table pen cup bottle phone clock hat coat shoe bag ball key box ring "
    "plate spoon knife mirror pillow candle camera guitar bicycle car train boat kite basket map"
).split()
FOODS = "bread cheese soup rice pasta salad cake honey milk tea coffee juice pizza fish".split()
PLACES = "forest village mountain river garden castle meadow island valley lake city farm".split()
WEATHER = "sunny cloudy rainy windy snowy foggy stormy".split()
TRAITS = "brave clever kind curious small quiet happy lonely friendly shy old young".split()
JOBS = "teacher doctor baker pilot farmer nurse painter writer engineer cook driver singer".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = (
    "January February March April May June July August September October November December"
).split()
_ONSETS = "b c d f g h j k l m n p r s t v w z br cl dr st tr sh ch".split()
_VOWELS = "a e i o u ai ea oo".split()
_CODAS = ["", "", "n", "r", "l", "s", "t", "m", "ck"]


def invented_word(rng: Random) -> str:
    """A word that no text holds, so that copying it cannot be learned by heart."""
    return "".join(
        rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
        for _ in range(rng.randint(1, 3))
    )


def a_name(rng: Random) -> str:
    """A person: mostly known, sometimes invented."""
    return rng.choice(NAMES) if rng.random() < 0.8 else invented_word(rng).capitalize()


def a_city(rng: Random) -> str:
    """A city: mostly known, sometimes invented."""
    return rng.choice(CITIES) if rng.random() < 0.85 else invented_word(rng).capitalize()


def a_thing(rng: Random) -> str:
    """An object."""
    return rng.choice(THINGS) if rng.random() < 0.85 else invented_word(rng)
