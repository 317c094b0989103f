"""Which positions a draft learns from: weights by how their tokens came about.

Everybody who trains drafts online chose another part: the corrected tokens (OSD, arXiv
2310.07177), the accepted ones (Aurora), all of them. compare.py sets them side by side on one
stream. A new choice is one line in the table.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from paceline.domain.learnings import TokenOrigin
from paceline.trainer.texts import Text

POSITIONS: dict[str, dict[TokenOrigin, float]] = {
    "all": dict.fromkeys(TokenOrigin, 1.0),
    "first-rejected": {TokenOrigin.CORRECTED: 1.0},
    "accepted": {TokenOrigin.ACCEPTED: 1.0},
    "rejected-heavy": {**dict.fromkeys(TokenOrigin, 1.0), TokenOrigin.CORRECTED: 3.0},
}
"""Weight by origin; what is not named counts nothing."""


def weighed(text: Text, positions: str) -> Text:
    """Return the text with the weights of a choice; without known origins it stays as it is.

    Raises:
        KeyError: there is no such choice.
    """
    weights = POSITIONS[positions]
    if text.origins_T is None:
        return text
    by_origin = np.zeros(len(TokenOrigin), np.float32)
    for origin, weight in weights.items():
        by_origin[origin] = weight
    return replace(text, weights_T=text.weights_T * by_origin[text.origins_T])
