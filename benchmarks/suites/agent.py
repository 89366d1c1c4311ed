"""An agent that runs errands in a simulated world over many turns; what it did to the world is judged."""

from .errands import Errand, Script
from .sample import Outputs, Sample
from .source import Source
from .world import TOOLS, World

SYSTEM = (
    "You run errands with tools. Answer every message with one tool call and nothing else. "
    "Use what earlier messages said.\nTools:\n" + TOOLS
)
ROOM = 32
AROUND = 16  # tokens a turn spends on introducing its passage, and on calls longer than the right one


def done(errand: Errand, before: World, after: World, reply: str) -> bool:
    """Whether the call went through and the whole state is what the right call would have made of it."""
    right = before.copy()
    right.call(errand.call)
    return reply == "ok" and after == right


def act(world: World, text: str) -> str:
    return world.call(text.strip().split("\n")[0])


class Episode:
    """`turns` errands with stretches of a novel between them, just under `context` tokens when done right.

    Each turn's prompt is the whole conversation so far with the agent's own calls and the world's replies.
    The state is rebuilt from the outputs, so an episode can be taken up anywhere.

    Raises ValueError where the context cannot hold the errands.
    """

    def __init__(self, source: Source, seed: int, turns: int):
        self.source = source
        self.errands = Script(seed).errands(turns)
        self.passages = [""] * turns
        ideal = [{"text": errand.call} for errand in self.errands]
        spare = source.context - len(source.chat(self.messages(ideal))) - ROOM
        if spare < 0:
            raise ValueError(f"A context of {source.context} tokens is too short for the agent by {-spare}.")
        share = spare // turns - AROUND
        if share > AROUND:
            novel = source.filler(seed, share * turns)
            self.passages = [
                source.tokenizer.decode(novel[i * share : (i + 1) * share]).strip() for i in range(turns)
            ]

    def messages(self, outputs: Outputs) -> list[dict]:
        """The conversation up to the errand that these outputs leave open."""
        world, reply = World(), ""
        messages = [{"role": "system", "content": SYSTEM}]
        for i, errand in enumerate(self.errands[: len(outputs) + 1]):
            passage = f"Skip this passage: {self.passages[i]}\n" if self.passages[i] else ""
            said = f"[{reply}]\n" if reply else ""
            content = f"{said}{passage}{errand.fact} {errand.text}".strip()
            messages.append({"role": "user", "content": content})
            if i < len(outputs):
                text = outputs[i]["text"].strip().split("\n")[0]
                messages.append({"role": "assistant", "content": text})
                reply = act(world, text)
        return messages

    def prompt(self, outputs: Outputs) -> list[int] | None:
        if len(outputs) == len(self.errands):
            return None
        return self.source.chat(self.messages(outputs))

    def score(self, outputs: Outputs, full: Outputs) -> dict[str, float]:
        """Share of errands done, and of each kind; a turn that was never reached is not done."""
        world, results = World(), []
        for i, errand in enumerate(self.errands):
            before = world.copy()
            reply = act(world, outputs[i]["text"]) if i < len(outputs) else "error: never reached"
            results.append((errand.kind, done(errand, before, world, reply)))
        kinds = {"": [right for _, right in results]}
        for kind, right in results:
            kinds.setdefault(kind, []).append(right)
        return {kind: sum(rights) / len(rights) for kind, rights in kinds.items()}


def agent(source: Source, seed: int, turns: int) -> Sample:
    episode = Episode(source, seed, turns)
    return Sample(seed, episode.prompt, episode.score, source.context + turns * ROOM, ROOM, stop=("\n",))
