"""Silence for scvi-tools and Lightning."""

from __future__ import annotations

import logging
import warnings

from scvae_tools._upstream import quiet


def test_loggers_and_filters_are_silenced_inside_only():
    logger, filters = logging.getLogger("lightning.pytorch"), list(warnings.filters)
    level = logger.level
    with quiet():
        assert logger.level == logging.ERROR
    assert logger.level == level
    assert warnings.filters == filters
