"""One command per table of figures; every table carries hardware, versions, commit and command."""
