"""nbval compares what a notebook prints and returns as text; pictures and HTML are other bytes on other versions."""


def pytest_collection_modifyitems(items: list) -> None:
    """Tell nbval's cells which kinds of output not to compare."""
    for item in items:
        if hasattr(item, "skip_compare"):
            item.skip_compare = (*item.skip_compare, "stderr", "text/html")
