"""Published memories to compare with: name -> class, one memory of one layer of one sequence.

Each is made with (shape of the layer, bytes it may hold), reads a Segment and returns its attention, says how
many bytes it holds, and whether it may go past the positions that the model was trained for (`unbounded`).
"""

from .everything import Everything
from .expected import Expected
from .infini import Infini
from .keydiff import KeyDiff
from .nearest import Nearest
from .streaming import Streaming

ALTERNATIVES = {
    "streaming": Streaming,
    "keydiff": KeyDiff,
    "expected": Expected,
    "infini": Infini,
    "nearest": Nearest,
    "everything": Everything,
}
