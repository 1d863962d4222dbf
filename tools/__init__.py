"""How the files under `assets/` were made."""
