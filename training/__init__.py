"""How the bundled model was made; README.md has the commands."""
