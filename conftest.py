"""nbval compares what a notebook prints and returns as text; pictures and HTML are other bytes on other versions."""


def pytest_collection_modifyitems(items: list) -> None:
    """Tell nbval's files which kinds of output not to compare."""
    for file in {item.parent for item in items if hasattr(item.parent, "skip_compare")}:
        file.skip_compare = (*file.skip_compare, "stderr", "text/html")
