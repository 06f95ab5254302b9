"""Closed sets of words the corpus draws its values from."""

from __future__ import annotations

import random

from assets.training.items import pick

NAMES = tuple(
    "Ada Adam Alan Alex Alice Amir Amy Ana Anders Andrea Anna Anton Arthur Ben Bella Bob Boris "
    "Carla Carlos Cem Chen Chloe Clara Daniel David Diana Diego Elena Eli Ella Emil Emily Emma "
    "Erik Eva Fatima Felix Finn Fiona Frank Freya George Grace Greta Gustav Hana Hannah Harry "
    "Helen Henry Hugo Ian Ida Igor Ines Ingrid Ivan Jack Jacob Jana Jane Javier John Jonas Julia "
    "Kai Karl Kate Kenji Klara Lara Laura Lea Lena Leo Liam Lily Lina Linda Louis Lucas Lucy "
    "Luis Maria Mark Marta Martin Mary Max Maya Mei Mia Michael Mila Milan Mohammed Nadia Nina "
    "Noah Nora Olga Oliver Omar Oscar Otto Paul Paula Peter Petra Philip Pia Priya Quinn Rachel "
    "Ravi Rita Robert Rosa Ruth Sam Samira Sara Simon Sofia Stefan Sven Tara Theo Thomas Tim Tina "
    "Tom Uma Vera Victor Walter Wendy William Yuki Yusuf Zoe".split()
)
ANIMALS = tuple(
    "cat dog fox owl frog horse rabbit bear mouse duck wolf lion goat whale turtle tiger penguin "
    "squirrel hedgehog parrot sheep cow pig dragon elephant monkey bee dolphin snail crab".split()
)
PETS = tuple("cat dog rabbit hamster parrot turtle horse mouse fish goat snake canary".split())
COLORS = tuple(
    "red blue green yellow black white purple orange pink brown silver golden grey turquoise "
    "violet".split()
)
PLACES = tuple(
    "forest city garden valley harbor mountain desert village island castle lake river beach farm "
    "park cave bridge tower market meadow library station moon sea".split()
)
OBJECTS = tuple(
    "key map lamp ring book kite drum box coin stone hat bell mirror boat clock umbrella flute "
    "crown letter shell basket rope feather candle balloon".split()
)
CITIES = (
    "Berlin Paris London Rome Madrid Vienna Oslo Prague Lisbon Dublin Athens Warsaw Zurich Geneva "
    "Hamburg Munich Cologne Milan Naples Venice Boston Chicago Dallas Denver Seattle Austin Miami "
    "Toronto Montreal Tokyo Kyoto Osaka Seoul Beijing Shanghai Delhi Mumbai Cairo Lagos Nairobi "
    "Sydney Melbourne Lima Bogota Santiago Helsinki Stockholm Copenhagen Brussels Amsterdam "
    "Barcelona Budapest Istanbul Krakow Leipzig Graz Porto Lyon Bern Turin"
)
CITIES = tuple(CITIES.split())
FOODS = tuple(
    "pizza pasta rice soup salad bread cheese sushi curry cake apples bananas chocolate pancakes "
    "noodles potatoes tomatoes fish eggs ice-cream strawberries burgers waffles lasagna".split()
)
HOBBIES = tuple(
    "chess football tennis swimming painting reading cooking hiking gardening dancing singing "
    "running cycling fishing sewing skiing sailing photography yoga climbing knitting".split()
)
JOBS = tuple(
    "teacher nurse baker driver farmer painter pilot doctor lawyer cook writer engineer gardener "
    "student plumber singer carpenter librarian mechanic".split()
)
NOUNS = tuple(
    "apple bird boat book bread bridge cake car cat chair city cloud coat coin cow cup desk dog "
    "door drum duck eagle egg eye farm fish flag flower forest fork fox frog garden glass goat "
    "gold grape grass hand hat hill honey horse house ice island key king kite lake lamp leaf "
    "lemon lion map milk mill moon mouse nest night nose oak ocean orange owl paper park pear pen "
    "piano pig plane plant plate queen rain ring river road rock rope rose sand sea seed sheep "
    "ship shoe snow song spoon star stone storm street sugar sun table tea tent tiger train tree "
    "truck valley violin wall water whale wheel wind window winter wolf wood".split()
)

_HEADS = tuple(
    "Ba Be Bo Bri Ca Ce Cla Da De Do Dra E El Fa Fe Fro Ga Gi Gra Ha He Ho I Ja Jo Ka Ke Kri La Le "
    "Li Lo Ma Me Mi Mo Na Ne No O Pa Pe Pra Ra Re Ro Sa Se Sha Si Sto Ta Te Ti Tra U Va Ve Vi Wa "
    "Wi Ya Yo Za Ze".split()
)
_MIDDLES = (
    "ba",
    "da",
    "la",
    "li",
    "lo",
    "ma",
    "mi",
    "na",
    "ni",
    "ra",
    "ri",
    "ro",
    "sa",
    "ta",
    "ti",
    "va",
    "vi",
    "",
    "",
    "",
    "",
)
_TAILS = tuple(
    "bel den do dra fi ga ka kel la lan len lia lin lo lon ma mar mi mon na nia nor ra ran rek "
    "ria rin ro ry s sa sen son ta tan ton us va vin x xa zo".split()
)


def person(rng: random.Random) -> str:
    """A first name: a common one, or an invented one so that copying has to be learnt."""
    if rng.random() < 0.5:
        return pick(rng, NAMES)
    return pick(rng, _HEADS) + pick(rng, _MIDDLES) + pick(rng, _TAILS)


def town(rng: random.Random) -> str:
    """A town: a known one, or an invented one."""
    if rng.random() < 0.6:
        return pick(rng, CITIES)
    return person(rng) + pick(
        rng, ("burg", "ville", "ton", "stad", "field", "ford", "bach", "hill")
    )
