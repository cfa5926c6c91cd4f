# SPDX-License-Identifier: Apache-2.0
"""The words of scenes and documents, and their division into splits."""

from __future__ import annotations

import zlib

import numpy as np

DOCUMENT_KEYS: tuple[str, ...] = (
    "total", "tax", "cash", "change", "milk", "tea", "bread", "rice", "eggs", "fish", "soap",
    "salt", "cake", "juice", "sugar", "paper", "pen", "book", "lamp", "room", "seat", "gate",
    "table", "date",
)  # fmt: skip
"""Names of a document's lines, printed in capitals."""

_WORD_LIST = """
    ACE ACID AGE AIR ANT APEX ARCH ARM ART ASH ATLAS AXE BAG BAKE BAND BANK BARN BASE BAT
    BEACH BEAN BEAR BED BEE BELL BELT BIKE BIRD BLADE BLOCK BLUE BOARD BOAT BOLD BOLT BONE
    BOOT BOWL BOX BRAVE BRICK BRIDGE BROOM BRUSH BUS CAB CABIN CAMEL CAMP CAN CANDLE CAP CAR
    CARD CARGO CASTLE CAT CAVE CHAIR CHALK CHEF CHESS CITY CLAY CLIFF CLOCK CLOUD CLUB COAL
    COAST COIN COLD COMET CORN COTTON COW CRANE CREST CROWN CUBE CUP CURVE DAISY DANCE DAWN
    DEER DELTA DESERT DESK DIAL DOG DOLL DOOR DOVE DRAGON DRUM DUCK DUNE DUST EAGLE EARTH ECHO
    EDGE ELBOW ELM EMBER ENGINE FABLE FALCON FARM FEAST FENCE FERN FIELD FIG FLAG FLAME FLUTE
    FOG FOREST FORK FOX FROG FROST FUEL GALAXY GARDEN GEM GHOST GLASS GLOVE GOAT GOLD GRAIN
    GRAPE GRASS GUITAR GULF HALL HAMMER HARBOR HARP HAWK HEDGE HERB HERON HILL HIVE HONEY
    HORSE HOTEL HOUSE ICE INK IRON ISLAND IVY JACKET JADE JAR JET JEWEL JOKE JUDGE JUNGLE
    KAYAK KETTLE KEY KING KITE KNIFE KNOT LADDER LAKE LAND LASER LAWN LEAF LEMON LENS LEVER
    LIGHT LILY LION LIZARD LOCK LOG LUNCH MAGNET MAP MAPLE MARBLE MASK MAZE MEADOW METAL MINT
    MIRROR MONKEY MOSS MOTOR MOUSE MUSIC NAIL NEEDLE NEST NET NIGHT NINE NORTH NOVA OAK OASIS
    OCEAN OLIVE ONYX ORBIT OTTER OVEN OWL PALACE PALM PANDA PARK PEARL PENCIL PEPPER PIANO
    PILOT PINE PIPE PLANET PLATE POEM POND PONY PRISM PUZZLE QUEEN QUILT RABBIT RADIO RAFT
    RAIN RAVEN REEF RIBBON RIDGE RIVER ROAD ROBOT ROCKET ROPE ROSE RUBY SADDLE SAIL SAND SCALE
    SEED SHARK SHELL SHIP SHOE SILK SILVER SKY SMOKE SNAIL SNOW SOCK SOLAR SPARK SPIDER SPOON
    SPRING STEAM STONE STORM STREET SUMMER SUN SWAN SWORD TEMPLE TENT TIGER TORCH TOWER TRAIN
    TREE TULIP TUNNEL TURTLE VALLEY VASE VELVET VIOLET VOLT WAGON WALL WATER WAVE WHALE WHEAT
    WHEEL WIND WINTER WOLF WOOD WOOL YARN YACHT ZEBRA ZERO ZINC ZONE
"""
WORDS: tuple[str, ...] = tuple(_WORD_LIST.split())
"""Short words for scenes."""

_CONSONANTS, _VOWELS = "BCDFGHJKLMNPQRSTVWXYZ", "AEIOU"


def split_of(text: str) -> str:
    """The only split that may show `text`; about 7 in 10 texts are for training."""
    bucket = zlib.crc32(b"vtc:" + text.encode()) % 10
    return "train" if bucket < 7 else "val" if bucket == 7 else "test"


def _made_up(rng: np.random.Generator) -> str:
    letters = []
    vowel = rng.random() < 0.3
    for _ in range(int(rng.integers(3, 7))):
        pool = _VOWELS if vowel else _CONSONANTS
        letters.append(pool[int(rng.integers(len(pool)))])
        vowel = not vowel if rng.random() < 0.8 else vowel
    return "".join(letters)


_BY_SPLIT = {s: tuple(w for w in WORDS if split_of(w) == s) for s in ("train", "val", "test")}


def sample_word(rng: np.random.Generator, split: str) -> str:
    """A word of `split`; two of three training words are made up, against memorisation."""
    if split == "train" and rng.random() < 0.67:
        while split_of(word := _made_up(rng)) != "train":
            pass
        return word
    pool = _BY_SPLIT[split]
    return pool[int(rng.integers(len(pool)))]


def sample_number(rng: np.random.Generator, split: str, digits: int) -> str:
    """A number of `split` with `digits` digits, without leading zeros."""
    while True:
        number = str(int(rng.integers(10 ** (digits - 1), 10**digits)))
        if split_of(number) == split:
            return number


def sample_amount(rng: np.random.Generator, split: str) -> str:
    """A document line's value: a whole number or an amount with two decimals."""
    while True:
        if rng.random() < 0.5:
            value = str(int(rng.integers(10, 1000)))
        else:
            value = f"{rng.integers(1, 100)}.{rng.integers(0, 100):02d}"
        if split_of(value) == split:
            return value
