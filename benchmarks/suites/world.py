"""The world that the agent acts on: an inventory, a calendar and files, changed by tool calls alone."""

import ast
import copy
from dataclasses import dataclass, field

TOOLS = """set_item("vases", 4)  there are now 4 vases in the inventory
remove_item("vases")  take all vases out of the inventory
add_event("May 14", "dentist")  put the dentist into the calendar on May 14
remove_event("dentist")  take the dentist out of the calendar
write_file("a.txt", "copper")  write copper into the file a.txt
delete_file("a.txt")  delete the file a.txt"""


@dataclass
class World:
    inventory: dict[str, int] = field(default_factory=dict)
    calendar: dict[str, str] = field(default_factory=dict)  # event -> day
    files: dict[str, str] = field(default_factory=dict)

    def copy(self) -> "World":
        return copy.deepcopy(self)

    def call(self, line: str) -> str:
        """Run one tool call written as Python, such as set_item("vases", 4); the reply is ok or error.

        Nothing changes on an error. Arguments are literals and are never evaluated.
        """
        try:
            node = ast.parse(line.strip(), mode="eval").body
            name, values = node.func.id, [ast.literal_eval(a) for a in node.args]
            values += [ast.literal_eval(k.value) for k in node.keywords]
        except (SyntaxError, ValueError, AttributeError, MemoryError, RecursionError):
            return "error"
        match name, values:
            case "set_item", [str(item), int(count)]:
                self.inventory[item] = count
            case "remove_item", [str(item)] if item in self.inventory:
                del self.inventory[item]
            case "add_event", [str(day), str(event)]:
                self.calendar[event] = day
            case "remove_event", [str(event)] if event in self.calendar:
                del self.calendar[event]
            case "write_file", [str(file), str(text)]:
                self.files[file] = text
            case "delete_file", [str(file)] if file in self.files:
                del self.files[file]
            case _:
                return "error"
        return "ok"
