"""Next-tool-call agreement on recorded conversations of tau-bench (arXiv 2406.12045), agent*.json."""

import json
import random
from functools import lru_cache

from .sample import Sample, ask
from .source import Source, place, take_split

FREE_TEXT = ("think", "calculate", "transfer_to_human_agents")  # calls that no two agents word alike
OPENING = '<tool_call>{"name": "'
FORMAT = f'\n\nCall one tool: {OPENING}...", "arguments": {{...}}}}</tool_call>'
ROOM = 96


def written(call: dict) -> str:
    """A tool call as the recorded agent's message shows it."""
    function = call["function"]
    return f'{OPENING}{function["name"]}", "arguments": {function["arguments"]}}}</tool_call>'


def plain(message: dict) -> dict:
    """A message in the roles that every chat template knows: tool results come from the user."""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>{message['content']}</tool_response>"}
    if message.get("tool_calls"):
        return {"role": "assistant", "content": written(message["tool_calls"][0])}
    return {"role": message["role"], "content": message["content"]}


def signatures(conversations: list[dict]) -> str:
    """The tools that the conversations call, with the names of their arguments."""
    tools: dict[str, set[str]] = {}
    for message in (m for c in conversations for m in c["traj"]):
        for call in message.get("tool_calls") or []:
            arguments = json.loads(call["function"]["arguments"])
            tools.setdefault(call["function"]["name"], set()).update(arguments)
    return "\n".join(f"- {name}({', '.join(sorted(tools[name]))})" for name in sorted(tools))


@lru_cache
def calls(source: Source) -> list[list[tuple[list[dict], dict]]]:
    """(messages before, call) for every recorded call whose prompt fits the context.

    One list per task, in a fixed random order: a split takes whole tasks, so that it never sees another's.
    """
    conversations = [c for path in source.files("agent*.json") for c in json.loads(path.read_text())]
    note = "\n\n# Tools\n\n" + signatures(conversations) + FORMAT
    found: dict[str, list] = {}
    for conversation in conversations:
        messages = [plain(m) for m in conversation["traj"]]
        messages[0] = {"role": "system", "content": messages[0]["content"] + note}
        for i, message in enumerate(conversation["traj"]):
            call = (message.get("tool_calls") or [None])[0]
            if call is None or call["function"]["name"] in FREE_TEXT:
                continue
            if len(source.chat(messages[:i], OPENING)) > source.context - ROOM:
                break
            found.setdefault(conversation["task_id"], []).append((messages[:i], call))
    rng = random.Random(0)
    return [rng.sample(group, len(group)) for _, group in sorted(found.items())]


def compare(text: str, function: dict) -> dict[str, float]:
    """1 for the recorded name and arguments; part `name`: for the name alone."""
    try:
        guess, _ = json.JSONDecoder().raw_decode('{"name": "' + text)
    except ValueError:
        name = text.split('"')[0]
        return {"": 0.0, "name": float(name == function["name"])}
    name = guess.get("name") == function["name"]
    same = name and guess.get("arguments") == json.loads(function["arguments"])
    return {"": float(same), "name": float(name)}


def airline(source: Source, seed: int) -> Sample | None:
    """One recorded call, given the conversation before it and the opening of a call."""
    known = [call for group in take_split(calls(source), seed) for call in group]
    known = random.Random(0).sample(known, len(known))
    if place(seed) >= len(known):
        return None
    messages, call = known[place(seed)]
    prompt = source.chat(messages, OPENING)
    return Sample(
        seed,
        ask(prompt),
        lambda outputs, full: compare(outputs[0]["text"], call["function"]),
        ROOM,
        stop=("</tool_call>",),
    )
