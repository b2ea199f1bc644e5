"""Colours of clusters: palettes for colour-blind readers, and shades of a colour for the parts of a cluster."""

from __future__ import annotations

import numpy as np

#: Eight colours that all common kinds of colour blindness tell apart: seven of Okabe and Ito (2008), and a dark red in
#: the place of their black, which would make the smallest component the most conspicuous one.
SAFE_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#f0e442", "#882255")
#: Shares of black in the first and of white in the last of the shades of a colour.
DARKEST, LIGHTEST = 0.3, 0.6


def safe_palette(n_categories: int) -> list[str] | None:
    """Return that many colours, as far as possible distinct for colour-blind readers; None above 102."""
    # scanpy's 20 are adjusted for colour blindness, unlike matplotlib's ten; for more, it takes 28 and 102 by itself.
    from scanpy.plotting.palettes import default_20, default_28, default_102

    palettes = (SAFE_COLOURS, default_20, default_28, default_102)
    return next((list(palette[:n_categories]) for palette in palettes if n_categories <= len(palette)), None)


def shades(colour: str, n_parts: int) -> list[str]:
    """Return a shade of a colour for each part of a cluster, from dark to light; the colour itself for a single one."""
    from matplotlib.colors import to_hex, to_rgb

    rgb = np.array(to_rgb(colour))
    if n_parts == 1:
        return [to_hex(rgb)]
    steps = np.linspace(-DARKEST, LIGHTEST, n_parts)
    return [to_hex(rgb * (1 + step) if step < 0 else rgb + step * (1 - rgb)) for step in steps]
