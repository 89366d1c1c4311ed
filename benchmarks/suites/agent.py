"""An agent that runs errands in a simulated world over many turns; what it did to the world is judged."""

from .errands import EXAMPLES, Errand, Script
from .sample import Outputs, Sample
from .source import Source
from .world import TOOLS, World

SYSTEM = (
    "You run errands with tools. Answer every message with one tool call and nothing else. "
    "Use what earlier messages said.\nTools:\n" + TOOLS
)
PASSAGE = "(I am reading: {text})\n"
ROOM = 24
AROUND = 24  # tokens a turn may spend on introducing its passage, and on a call longer than the right one
LEAST = 16  # tokens that are worth reading aloud


def said(reply: str, passage: str, errand: Errand) -> dict:
    """A turn's message: what the world replied to the last call, the passage, the fact, the errand."""
    return {"role": "user", "content": f"[{reply}]\n{passage}{errand.fact} {errand.text}".replace("\n ", "\n")}


def answer(output: dict) -> str:
    return output["text"].strip().split("\n")[0]


def done(errand: Errand, before: World, after: World, reply: str) -> bool:
    """Whether the call went through and the whole state is what the right call would have made of it."""
    right = before.copy()
    right.call(errand.call)
    return reply == "ok" and after == right


class Episode:
    """`turns` errands with stretches of a novel between them, within `context` tokens whatever the agent calls.

    Each turn's prompt is the whole conversation so far with the agent's own calls and the world's replies; a
    few worked examples open it. The state is rebuilt from the outputs, so an episode can be taken up anywhere.

    Raises ValueError where the context cannot hold the errands.
    """

    def __init__(self, source: Source, seed: int, turns: int):
        self.source = source
        self.errands = Script(seed).errands(turns)
        self.passages = [""] * turns
        right = [{"text": errand.call} for errand in self.errands[:-1]]
        spare = source.context - len(source.chat(self.messages(right))) - ROOM - turns * AROUND
        if spare < 0:
            raise ValueError(f"A context of {source.context} tokens is too short for the agent by {-spare}.")
        share = spare // turns
        if share > LEAST:
            novel = source.filler(seed, share * turns)
            texts = [source.tokenizer.decode(novel[i * share :][:share]).strip() for i in range(turns)]
            self.passages = [PASSAGE.format(text=text) for text in texts]

    def messages(self, outputs: Outputs) -> list[dict]:
        """The conversation up to the errand that these outputs leave open."""
        world, reply = World(), "ready"
        messages = [{"role": "system", "content": SYSTEM}]
        turns = [(example, "", example.call) for example in EXAMPLES]
        turns += zip(self.errands, self.passages, map(answer, outputs), strict=False)
        for errand, passage, call in turns:
            messages += [said(reply, passage, errand), {"role": "assistant", "content": call}]
            reply = world.call(call)
        i = len(outputs)
        return [*messages, said(reply, self.passages[i], self.errands[i])]

    def prompt(self, outputs: Outputs) -> list[int] | None:
        if len(outputs) == len(self.errands):
            return None
        return self.source.chat(self.messages(outputs))

    def score(self, outputs: Outputs, full: Outputs) -> dict[str, float]:
        """Share of errands done, and of each kind; a turn that was never reached is not done."""
        world = World()
        for example in EXAMPLES:
            world.call(example.call)
        rights: dict[str, list[bool]] = {"": [], "direct": [], "recall": []}
        for i, errand in enumerate(self.errands):
            before = world.copy()
            right = i < len(outputs) and done(errand, before, world, world.call(answer(outputs[i])))
            rights[""].append(right)
            rights[errand.kind].append(right)
        return {kind: sum(values) / len(values) for kind, values in rights.items() if values}


def agent(source: Source, seed: int, turns: int) -> Sample:
    episode = Episode(source, seed, turns)
    return Sample(seed, episode.prompt, episode.score, ROOM, stop=("\n",), growing=True)
