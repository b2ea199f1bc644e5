"""Version of the package."""

from importlib import metadata

__version__ = metadata.version("scvae-tools")
