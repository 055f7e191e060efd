"""Facts about a metric before it is computed; everything that lists, prints or plots metrics reads them."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from dmquant.evaluation.metrics.scored_images import ScoredImages
    from dmquant.evaluation.result import Metric

Direction = Literal["higher", "lower"]
Need = Literal["reference", "latents", "real", "clip", "prompts"]
ARROWS = {"higher": "↑", "lower": "↓"}
DIGITS = re.compile(r"#?\.\d[fg]")  # what the script of report.html can print, too


@dataclass(frozen=True)
class Kind:
    """A metric: `name` in report.json and on the command line, `function`, and how its values are printed.

    `title`, `unit` and `digits` (".4f" or "#.3g") are for people, `better` is the direction. `needs` are the inputs
    of the function: the full-precision images (`reference`) and their final `latents`, `real` images, the network of
    --clip, the `prompts`. A metric that does not need the reference is computed of full precision itself, too. With
    `per_image` it has a value an image, which goes to scores.csv. With `default` it is computed where --metrics is not
    given and its needs are at hand.

    The function raises UnavailableError where weights or code are not at hand, UserError for unreadable images; `Kind`
    itself raises ValueError for a direction, a need or digits that mean nothing.
    """

    name: str
    function: Callable[["ScoredImages"], "Metric"]
    title: str
    better: Direction
    digits: str
    needs: frozenset[Need]
    unit: str = ""
    per_image: bool = False
    default: bool = False

    def __post_init__(self) -> None:
        if self.better not in ARROWS or self.needs - set(get_args(Need)) or not DIGITS.fullmatch(self.digits):
            raise ValueError(f"{self.name}: {self.better!r}, {set(self.needs)} or {self.digits!r} means nothing")

    @property
    def sign(self) -> int:
        """Times a value: the higher, the better."""
        return 1 if self.better == "higher" else -1

    def heading(self, network: str | None = None) -> str:
        """The title and which way is better; a network of --clip is named: "PSNR ↑", "CLIP score (emoji-clip) ↑"."""
        through = f" ({network})" if network and "clip" in self.needs else ""
        return f"{self.title}{through} {ARROWS[self.better]}"

    def number(self, value: float) -> str:
        """A value without its unit."""
        return f"{value:{self.digits}}"

    def text(self, value: float) -> str:
        """A value with its unit: "27.50 dB"."""
        return f"{self.number(value)}{self.unit}"
