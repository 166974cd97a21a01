"""Numbers of things in words."""


def noun(number: int, thing: str) -> str:
    """Return the name of a thing, with its plural ending unless there is one of them: row, rows, losses."""
    return thing if number == 1 else f"{thing}{'es' if thing.endswith('s') else 's'}"


def counted(number: int, thing: str) -> str:
    """Return how many things there are: 1 row, 2 rows, 1,600 rows."""
    return f"{number:,} {noun(number, thing)}"
