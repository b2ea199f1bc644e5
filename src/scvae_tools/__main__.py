"""``python -m scvae_tools``: the command line."""

from __future__ import annotations

from scvae_tools._cli import main

if __name__ == "__main__":
    raise SystemExit(main())
