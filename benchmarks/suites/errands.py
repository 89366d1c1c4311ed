"""The errands that a user gives the agent, one a turn: what is said, and the tool call that does it."""

import random
from dataclasses import dataclass

ITEMS = (
    "vases lamps chairs books plates cups boxes ropes nails brushes candles pillows blankets mirrors clocks "
    "baskets bottles buckets ladders shovels hammers kettles pans spoons forks towels curtains stamps pencils"
).split()
EVENTS = (
    "dentist haircut concert picnic lecture meeting exam dinner match wedding interview rehearsal checkup "
    "workshop parade auction festival marathon tour recital seminar regatta banquet"
).split()
WORDS = (
    "copper velvet harbor cedar lantern marble orchid pepper quartz raven saffron thistle walnut amber "
    "basil coral ember falcon garnet hazel indigo jasper lilac maple nickel olive pearl ruby topaz"
).split()
PEOPLE = (
    "Anna Boris Clara David Elena Felix Greta Hugo Irene Jonas Karin Leo Maria Nils Olga Paul Rosa Simon "
    "Viktor Wanda Yusuf Zora Bruno Dora Emil Flora Gustav Hilda Ivan"
).split()
DAYS = [f"{month} {day}" for month in ("March", "May", "June", "July", "October") for day in range(2, 29)]


@dataclass(frozen=True)
class Errand:
    """`fact`: something told in passing, for later. `kind`: direct, or recall of what earlier turns said."""

    text: str
    call: str
    kind: str
    fact: str = ""


EXAMPLES = (
    Errand("There are now 3 jars in the inventory.", 'set_item("jars", 3)', "direct"),
    Errand(
        "Put the opera into the calendar on April 12.",
        'add_event("April 12", "opera")',
        "direct",
        "By the way, the phone number of Kim is 5507.",
    ),
    Errand("There are now as many pots as jars in the inventory.", 'set_item("pots", 3)', "recall"),
    Errand("Write scarlet into the file memo.txt.", 'write_file("memo.txt", "scarlet")', "direct"),
    Errand("Write the phone number of Kim into the file kim.txt.", 'write_file("kim.txt", "5507")', "recall"),
    Errand("Take the opera out of the calendar.", 'remove_event("opera")', "direct"),
)


class Script:
    """Draws errands one by one; remembers what has been said and done, so that later ones can refer to it."""

    def __init__(self, seed: int):
        self.rng = random.Random(f"errands {seed}")
        self.items = self.shuffled(ITEMS)
        self.events = self.shuffled(EVENTS)
        self.words = self.shuffled(WORDS)
        self.people = self.shuffled(PEOPLE)
        self.days = self.shuffled(DAYS)
        self.told: dict[tuple[str, str], str] = {}  # (kind of fact, person) -> value, not asked for yet
        self.counted: dict[str, int] = {}  # item in the inventory -> count
        self.dated: list[str] = []  # events in the calendar
        self.written = 0

    def shuffled(self, pool) -> list[str]:
        return self.rng.sample(pool, len(pool))

    def draw(self, pool: list):
        """The next of a pool, each once before any comes again."""
        pool.append(value := pool.pop(0))
        return value

    def count(self, count: int) -> tuple[str, int]:
        """The next item of which there are not that many yet, and the count."""
        item = self.draw(self.items)
        while self.counted.get(item) == count:
            item = self.draw(self.items)
        self.counted[item] = count
        return item, count

    def file(self, stem: str) -> str:
        self.written += 1
        return f"{stem}{self.written}.txt"

    def direct(self) -> Errand:
        """An errand that says all it needs, and a fact about somebody told along with it."""
        match self.rng.choice(("item", "event", "file", "remove")):
            case "event":
                event, day = self.draw(self.events), self.draw(self.days)
                self.dated = [other for other in self.dated if other != event] + [event]
                text, call = f"Put the {event} into the calendar on {day}.", f'add_event("{day}", "{event}")'
            case "file":
                word, file = self.draw(self.words), self.file("note")
                text, call = f"Write {word} into the file {file}.", f'write_file("{file}", "{word}")'
            case "remove" if self.dated:
                event = self.dated.pop(self.rng.randrange(len(self.dated)))
                text, call = f"Take the {event} out of the calendar.", f'remove_event("{event}")'
            case _:
                item, count = self.count(self.rng.randrange(2, 60))
                text, call = f"There are now {count} {item} in the inventory.", f'set_item("{item}", {count})'
        return Errand(text, call, "direct", self.tell())

    def tell(self) -> str:
        person = self.draw(self.people)
        kind = self.rng.choice(("phone number", "birthday", "password"))
        match kind:
            case "phone number":
                value = str(self.rng.randrange(1000, 10000))
            case "birthday":
                value = self.draw(self.days)
            case _:
                value = self.draw(self.words)
        self.told[kind, person] = value
        return f"By the way, the {kind} of {person} is {value}."

    def recall(self) -> Errand:
        """An errand that needs what an earlier turn said, or what the state is now."""
        if self.counted and self.rng.random() < 0.25:
            like = self.rng.choice(list(self.counted))
            item, count = self.count(self.counted[like])
            return Errand(
                f"There are now as many {item} as {like} in the inventory.",
                f'set_item("{item}", {count})',
                "recall",
            )
        kind, person = self.rng.choice(list(self.told))
        value = self.told.pop((kind, person))
        if kind == "birthday":
            event = f"party for {person}"
            return Errand(
                f"Put the {event} into the calendar on the birthday of {person}.",
                f'add_event("{value}", "{event}")',
                "recall",
            )
        file = self.file(person.lower())
        return Errand(
            f"Write the {kind} of {person} into the file {file}.",
            f'write_file("{file}", "{value}")',
            "recall",
        )

    def errands(self, turns: int) -> list[Errand]:
        """Half of the errands recall, at distances from one turn to all of them; the first two are direct."""
        drawn = []
        for turn in range(turns):
            ask_back = turn > 1 and self.told and self.rng.random() < 0.5
            drawn.append(self.recall() if ask_back else self.direct())
        return drawn
